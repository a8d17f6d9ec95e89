"""Tasks read from files: gsm8k and jsonl."""

import itertools
import json
import logging

import jax
import numpy as np
import pytest

from jaxrl_llm import tasks
from jaxrl_llm.tasks.host import byte_pair_tokenizer
from jaxrl_llm.tasks.rows import DataError


def rows(start, count):
    return [
        {"question": f"What is {i} plus {i}?", "answer": f"It is <<{i}+{i}>>.\n#### {2 * i}"}
        for i in range(start, start + count)
    ]


def write(path, content):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", rows(0, 10))
    write(tmp_path / "test.jsonl", rows(1000, 4))
    return tmp_path


def gsm8k(folder, **knobs):
    return tasks.load("gsm8k", data=folder, **{"vocab_size": 300, "prompt_length": 64, "response_length": 32, **knobs})


def test_prompts_and_columns(folder):
    task = gsm8k(folder)
    prompts = task.test(4)
    assert tasks.decode_prompts(task.tokenizer, prompts)[1] == "Question: What is 1001 plus 1001?\nAnswer:"
    assert task.columns(prompts) == {"answer": ["2000", "2002", "2004", "2006"]}
    assert (task.rows, prompts.context.tokens.shape) == (10, (4, 64)) and (np.asarray(prompts.index) < 10).all()
    assert (np.diff(np.asarray(prompts.context.mask).astype(int)) <= 0).all()
    assert task.draw is None and task.verify is None and prompts.logged is None
    with pytest.raises(ValueError, match="the test set has 4 problems, asked for 5"):
        task.test(5)


def test_verifier_reads_the_responses(folder):
    task = gsm8k(folder)
    said = ["so #### 2000", "2000.0", "#### 2000 apples", "#### 2001", "", "2000 #### 7"]
    ids = [[*task.tokenizer.encode(text), task.tokenizer.eos_token_id, 40] for text in said]
    tokens, mask, _ = tasks.pad_tokens(ids, 32, "right")
    scores = tasks.host_verifier(task)(task.test(1), tokens[None], mask[None])
    assert scores.tolist() == [[1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]


def test_batches_are_epochs_in_an_order_of_their_seed(folder):
    task = gsm8k(folder)

    def indices(seed, n, count, start=0):
        return np.concatenate([b.index for b in itertools.islice(task.batches(seed, n, start), count)]).tolist()

    stream = indices(1, 4, 15)  # 60 rows: six epochs, in batches that span two of them
    epochs = [stream[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert stream == indices(1, 4, 15) == indices(1, 20, 3) and stream != indices(2, 4, 15)
    assert indices(1, 4, 5, start=10) == stream[40:]
    batch = next(task.batches(1, 4))
    for text, i in zip(tasks.decode_prompts(task.tokenizer, batch), batch.index, strict=True):
        assert f"What is {i} plus {i}?" in text
    assert task.columns(batch)["answer"] == [str(2 * int(i)) for i in batch.index]


def test_cut_prompts_keep_their_end_and_are_reported(folder, caplog):
    with caplog.at_level(logging.WARNING):
        task = gsm8k(folder, prompt_length=8)
    text = tasks.decode_prompts(task.tokenizer, task.test(1))[0]
    assert text.endswith("?\nAnswer:") and not text.startswith("Question")
    assert (task.report.cut_train, task.report.cut_test) == (10, 4) and task.report.longest > 8
    assert "10 training prompts cut on the left; 4 test prompts cut on the left" in str(task.report)
    assert str(task.report) in caplog.text
    assert gsm8k(folder).report.cut_train == 0


def test_bad_rows_stop_the_task_or_are_reported(folder):
    good = (folder / "test.jsonl").read_text()
    (folder / "test.jsonl").write_text(good + '{"question": "x"}\n')
    with pytest.raises(DataError, match=r'test.jsonl, line 5, field "answer"'):
        gsm8k(folder, vocab_size=1)  # the row is found before the tokenizer is
    task = gsm8k(folder, skip_bad_rows=True)
    assert (task.report.train, task.report.test, len(task.report.skipped)) == (10, 4, 1)
    assert "1 bad rows skipped" in str(task.report) and "line 5" in task.report.skipped[0]
    (folder / "test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"test.jsonl"):
        gsm8k(folder)


def test_shared_prompts_are_reported(folder):
    write(folder / "test.jsonl", rows(8, 4))
    assert gsm8k(folder).report.shared == 2


def test_logged_solutions_end_in_eos_and_score_one(folder):
    task = gsm8k(folder, logged=True, response_length=64)
    prompts = task.test(4)
    logged = prompts.logged
    assert logged.tokens.shape == (4, 1, 64) and (np.asarray(logged.reward) == 1).all()
    assert tasks.decode_responses(task.tokenizer, logged.tokens, logged.mask)[0] == [" It is <<1000+1000>>.\n#### 2000"]
    lengths = np.asarray(logged.mask).sum(-1)
    assert (
        np.take_along_axis(np.asarray(logged.tokens), lengths[..., None] - 1, -1) == task.tokenizer.eos_token_id
    ).all()
    assert (tasks.host_verifier(task)(prompts, logged.tokens, logged.mask) == 1).all()
    assert gsm8k(folder, logged=True, response_length=4).report.cut_responses == 14


def test_templates(folder):
    task = gsm8k(folder, template="{question}|")
    assert tasks.decode_prompts(task.tokenizer, task.test(1)) == ["What is 1000 plus 1000?|"]
    for template in ("no field", "{question} {answer}", "{", "{}"):
        with pytest.raises(ValueError, match="template"):
            gsm8k(folder, template=template)


def test_braces_in_questions_are_text(folder):
    write(folder / "train.jsonl", [{"question": "{question} {0} {", "answer": "#### 1"}])
    task = gsm8k(folder)
    assert tasks.decode_prompts(task.tokenizer, next(task.batches(0, 1))) == ["Question: {question} {0} {\nAnswer:"]


def test_a_tokenizer_of_ones_own(folder, tmp_path):
    own = byte_pair_tokenizer(["Question: What is 1 plus 1?"], 280)
    own.save_pretrained(tmp_path / "own")
    for tokenizer in (own, str(tmp_path / "own")):
        task = gsm8k(folder, tokenizer=tokenizer)
        assert len(task.tokenizer) == len(own)
        assert "What is 1000 plus 1000?" in tasks.decode_prompts(task.tokenizer, task.test(1))[0]
    own.pad_token = own.eos_token
    with pytest.raises(ValueError, match="task gsm8k: the tokenizer pads with its EOS"):
        gsm8k(folder, tokenizer=own)


def test_chat_template_is_used_if_there_is_one(folder, monkeypatch):
    pytest.importorskip("jinja2")
    own = byte_pair_tokenizer(["Question: What is 1 plus 1?"], 280)
    own.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    task = gsm8k(folder, tokenizer=own)
    assert tasks.decode_prompts(task.tokenizer, task.test(1)) == ["[user] What is 1000 plus 1000?\n[assistant]"]
    plain = gsm8k(folder, tokenizer=own, template="{question}")
    assert tasks.decode_prompts(plain.tokenizer, plain.test(1)) == ["What is 1000 plus 1000?"]


def test_byte_pair_tokenizer_round_trip(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = byte_pair_tokenizer(["the cat and the hat"] * 9, 270)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1) and 258 < len(tokenizer) <= 270
    tokenizer.save_pretrained(tmp_path)
    for own in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("the  cat , it 's\n\n 1234 .", " \u00e9\u6f22\U0001f600\x00", "don 't !"):
            assert own.decode(own.encode(text)) == text
        assert len(own.encode("1234")) == 4, "digits are tokens of their own"
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        byte_pair_tokenizer(["x"], 257)


def test_jsonl_folder_columns_and_own_verifier(tmp_path):
    write(tmp_path / "train.jsonl", [{"q": "capital of France", "a": "Paris"}, {"q": "six", "a": 6}])
    write(tmp_path / "test.jsonl", [{"q": "capital of Italy", "a": "Rome"}])
    knobs = {"data": tmp_path, "prompt": "q", "answer": "a", "vocab_size": 300, "template": "{q}:"}
    task = tasks.load("jsonl", **knobs)
    assert tasks.decode_prompts(task.tokenizer, task.test(1)) == ["capital of Italy:"]
    ids = [task.tokenizer.encode(text) for text in ("Rome", "rome")]
    tokens, mask, _ = tasks.pad_tokens(ids, 8, "right")
    assert tasks.host_verifier(task)(task.test(1), tokens[None], mask[None]).tolist() == [[1.0, 0.0]]

    def length(prompts, completions, answer):
        return [float(len(text)) for text in completions]

    own = tasks.load("jsonl", grade=length, **knobs)
    assert tasks.host_verifier(own)(own.test(1), tokens[None], mask[None]).tolist() == [[4.0, 4.0]]


def test_jsonl_holds_out_a_part_of_a_single_file(tmp_path):
    file = tmp_path / "all.jsonl"
    write(file, [{"prompt": f"p{i % 50}", "answer": str(i)} for i in range(100)])
    task = tasks.load("jsonl", data=file, vocab_size=300)
    parts = [task.test(task.report.test), next(task.batches(0, task.rows))]
    held_out, train = (set(tasks.decode_prompts(task.tokenizer, part)) for part in parts)
    assert len(held_out | train) == 50 and not held_out & train and 1 <= len(held_out) <= 12
    assert task.report.train + task.report.test == 100 and task.report.shared == 0
    write(file, [{"prompt": "p", "answer": "a"}])
    with pytest.raises(DataError, match="too few to hold some out; give the test file"):
        tasks.load("jsonl", data=file)
    write(tmp_path / "other.jsonl", [{"prompt": "q", "answer": "b"}])
    assert tasks.load("jsonl", data=file, test=tmp_path / "other.jsonl", vocab_size=300).report.test == 1
    with pytest.raises(FileNotFoundError, match=r"no train.jsonl or train.parquet in"):
        tasks.load("jsonl", data=tmp_path)


def test_jsonl_reads_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for part in ("train", "test"):
        parquet.write_table(pyarrow.table({"prompt": [part], "answer": [0.5]}), tmp_path / f"{part}.parquet")
    task = tasks.load("jsonl", data=tmp_path, vocab_size=300)
    assert task.columns(task.test(1)) == {"answer": ["0.5"]}


def test_host_batches_are_one_structure_for_the_compiler(folder):
    task = gsm8k(folder)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), b) for b in itertools.islice(task.batches(0, 3), 5)]
    assert all(shape == shapes[0] for shape in shapes)
