"""The shipped policy, the job around it, and what the command line says to a user who errs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxrl_llm import checkpoint, cli, job, report, tasks
from jaxrl_llm.arguments import arguments
from jaxrl_llm.evaluate import evaluator
from jaxrl_llm.models import hf
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.progress import sparkline
from jaxrl_llm.tasks.host import byte_pair_tokenizer

SMALL = ["--steps", "3", "--prompts-per-step", "4", "--set", "group_size=4", "--eval-problems", "16"]


@pytest.fixture(scope="module")
def shipped():
    return hf.load(cli.SHIPPED)


def test_shipped_policy_is_small_and_speaks_the_tasks_language(shipped):
    files = [path for path in cli.SHIPPED.rglob("*") if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "MODEL_CARD.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert 1_000_000 <= sum(x.size for x in jax.tree.leaves(shipped[1])) <= 3_000_000

    task = tasks.load(cli.QUICKSTART.task, **cli.QUICKSTART.task_options)
    tokenizer = AutoTokenizer.from_pretrained(str(cli.SHIPPED), local_files_only=True)
    assert tokenizer.get_vocab() == task.tokenizer.get_vocab()
    text = "1234+5678=>;"
    assert tokenizer(text)["input_ids"] == task.tokenizer(text)["input_ids"]
    special = ("eos_token_id", "pad_token_id")
    assert [getattr(tokenizer, name) for name in special] == [getattr(task.tokenizer, name) for name in special]


def test_shipped_policy_knows_the_form_but_mostly_takes_the_wrong_way(shipped):
    config, params = shipped
    task = tasks.load(cli.QUICKSTART.task, **cli.QUICKSTART.task_options)
    found = evaluator(language_model(transformer(config)), task, problems=128, transcripts=128)(params)
    assert found.problems == 128
    assert 0.02 <= found.accuracy <= 0.45
    wrong = [text for text in found.transcripts if text["reward"] == 0]
    forgetful = sum(_without_carries(text["prompt"]) == text["response"] for text in wrong)
    assert forgetful >= 0.8 * len(wrong)


def _without_carries(prompt: str) -> str:
    a, b = prompt.rstrip("=").split("+")
    totals = [int(x) + int(y) for x, y in zip(reversed(a), reversed(b), strict=True)]
    steps = [f"{x}+{y}={total}" for x, y, total in zip(reversed(a), reversed(b), totals, strict=True)]
    answer = str(totals[-1]) + "".join(str(total % 10) for total in reversed(totals[:-1]))
    return ";".join(steps) + ">" + answer


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs with a space") / "quickstart"
    cli.main(["quickstart", *SMALL, "--eval-every", "2", "--seed", "3", "--run", str(folder)])
    return folder


def test_quickstart_leaves_what_it_promises(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for when in ("before", "after"):
        assert set(summary[when]) == {"accuracy", "reward"}
        assert all(0 <= value <= 1 for value in summary[when].values())
    assert summary["seed"] == 3 and summary["steps"] == 3 and summary["problems"] == 16
    assert list(summary["evaluations"]) == ["0", "2", "3"]
    assert summary["evaluations"]["3"] == summary["after"]

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < rows[2]["seconds"]
    assert rows[2]["seconds"] == pytest.approx(summary["train_seconds"], abs=0.01)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(row["gap/max"] < 1e-4 for row in rows)

    written = json.loads((finished / "config.json").read_text())
    assert set(written["config"]) == {field.name for field in dataclasses.fields(job.TrainConfig)}
    assert written["config"]["set"] == {"group_size": 4, "kl": None}
    assert written["config"]["task_options"] == cli.QUICKSTART.task_options
    assert "clip_min" in written["recipe"] and "kl_to_reference" not in written["recipe"]
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")

    transcripts = json.loads((finished / "transcripts.json").read_text())
    assert [t["prompt"] for t in transcripts["before"]] == [t["prompt"] for t in transcripts["after"]]


def test_quickstart_checkpoint_and_policy_are_the_trained_ones(finished, shipped):
    _, trained = hf.load(finished / "policy")
    assert not _equal(trained, shipped[1])
    config = dataclasses.replace(cli.QUICKSTART, steps=3, prompts_per_step=4, set={"group_size": 4, "kl": None}, seed=3)
    prepared = job.prepare(dataclasses.replace(config, run=finished.parent / "other"))
    like = jax.eval_shape(job.learner_of(prepared).init, jax.random.key(0))
    state = checkpoint.load(finished / "checkpoints" / "3", like)
    assert int(state.step) == 3
    assert _equal(state.params["policy"], trained)


def _equal(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_curve_is_drawn_from_the_files_alone(finished):
    (finished / "curve.png").unlink()
    assert report.curve(finished) == finished / "curve.png"
    assert (finished / "curve.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random policy of one layer that knows bytes."""
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = TransformerConfig(**sizes, **heads)
    params = transformer(config).init(jax.random.key(0))
    hf.save(folder, config, jax.device_get(params), tokenizer=byte_pair_tokenizer(["0 1 2"], 258))
    return folder


def test_host_verifier_inside_and_between_give_equal_runs(tmp_path, tiny):
    lines = [json.dumps({"prompt": f"number {i}", "answer": i % 3}) for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines, '{"prompt": 1, "answer": "2"}']))
    runs = {}
    for verify in ("inside", "between"):
        line = "train --task jsonl --skip-bad-rows --task-options response_length=16 prompt_length=16"
        line += f" --steps 2 --set group_size=16 kl=none --eval-problems 4 --learning-rate 1e-3 --verify {verify}"
        paths = ["--policy", str(tiny), "--data", str(tmp_path / "data.jsonl"), "--run", str(tmp_path / verify)]
        cli.main([*line.split(), *paths])
        rows = [json.loads(line) for line in (tmp_path / verify / "metrics.jsonl").read_text().splitlines()]
        runs[verify] = [{name: x for name, x in row.items() if name != "seconds"} for row in rows]
    assert any(row["reward/mean"] > 0 for row in runs["inside"])
    for inside, between in zip(*runs.values(), strict=True):
        assert inside == pytest.approx(between, rel=1e-5, abs=2e-6)  # gaps are rounding


BAD = {
    "train --task aritmetic": "did you mean 'arithmetic'",
    "train --algorithm grop": "did you mean 'grpo'",
    "train --set grupsize=8": "did you mean 'group_size'",
    "train --set group_size=many": "--set group_size: expected int, got 'many'",
    "train --set kl_estimator=k9": "expected the name of a function, got 'k9'",
    "train --task-options digit=4": "did you mean 'digits'",
    "train --task-options digits=0": "arithmetic: digits must be from 1 to 64",
    "train --task gsm8k": "needs --data",
    "train --task gsm8k --data nowhere": "no file nowhere/train.jsonl",
    "train --data nowhere": "reads no data",
    "train --skip-bad-rows": "reads no data",
    "train --policy nowhere": "nowhere/config.json: no such file",
    "train --steps 0": "--steps must be at least 1, got 0",
    "train --steps 10 --scan 3": "--scan 3 must divide --steps 10",
    "train --temperature 0": "--temperature must be positive",
    "train --top-p 2": "--top-p must be above 0 and at most 1, got 2",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_clear_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert BAD[line] in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


UNKNOWN = ("train --setp 3", "train --steps x", "train --set kl", "train --set =1", "nothing", "")


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown_options_are_errors(line, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2


def test_existing_run_is_kept(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("precious")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--run", str(tmp_path)])
    assert stop.value.code == 2
    assert f"{tmp_path} already holds a run: choose another --run, or pass --overwrite" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "precious"


def test_malformed_row_stops_before_anything_is_written(tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    good = json.dumps({"question": "1 + 1?", "answer": "#### 2"})
    (data / "train.jsonl").write_text(f'{good}\n{{"question": "2 + 2?"}}\n{good}\n')
    (data / "test.jsonl").write_text(f"{good}\n")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--task", "gsm8k", "--data", str(data), "--run", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    for part in (str(data / "train.jsonl"), "line 2", 'field "answer"', "expected"):
        assert part in error
    assert not (tmp_path / "run").exists()


def test_programming_errors_are_not_swallowed(monkeypatch, tmp_path):
    def broken(_):
        raise ValueError("a bug")

    monkeypatch.setattr(cli, "execute", broken)
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", "--run", str(tmp_path / "run")])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "quickstart" in said and "gsm8k" in said and "dr_grpo" in said


def test_naming_an_argument_keeps_the_other_defaults_unless_the_recipe_changes():
    assert cli.parse(["quickstart", "--set", "clip=0.1"]).set == cli.QUICKSTART.set | {"clip": 0.1}
    assert cli.parse(["quickstart", "--algorithm", "rloo"]).set == {}
    assert cli.parse(["quickstart"]) == cli.QUICKSTART
    assert cli.parse(["train", "--set", "a=1", "b=2.5", "c=none", "d=true", "e=text", "f=1e-3"]).set == {
        "a": 1, "b": 2.5, "c": None, "d": True, "e": "text", "f": 1e-3
    }  # fmt: skip


def test_arguments_fit_the_function():
    def recipe(*, size: int = 8, clip: float = 0.2, kl: float | None = 0.04, on: bool = True):
        return None

    given = {"clip": 1, "kl": None, "size": 4, "on": False}
    found = arguments(recipe, given, "--set")
    assert found == given and isinstance(found["clip"], float)
    for bad in ({"size": 2.5}, {"size": True}, {"clip": None}, {"on": 1}, {"sise": 1}):
        with pytest.raises(ValueError, match="--set"):
            arguments(recipe, bad, "--set")


def test_sparkline():
    assert sparkline([0, 0.5, 1]) == "▁▅█" or sparkline([0, 0.5, 1]) == "▁▄█"
    assert sparkline([float("nan")]) == ""
    assert len(sparkline([0.1] * 1000)) <= 16
