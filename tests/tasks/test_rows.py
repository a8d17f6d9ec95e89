import json
import sys

import pytest

from jaxrl_llm.tasks.answers import gold_answer
from jaxrl_llm.tasks.rows import DataError, read_rows

GOOD = b'{"question": "one?", "answer": "#### 1"}'
BAD = {
    "bad JSON": (b'{"question": "x", ', None, "expected a JSON object, got invalid JSON .* at column"),
    "two objects": (GOOD + GOOD, None, "invalid JSON"),
    "NaN": (b'{"question": "x", "answer": NaN}', None, "NaN is not JSON"),
    "not an object": (b'["question", "answer"]', None, "expected a JSON object, got a list"),
    "a bare number": (b"3", None, "expected a JSON object, got a number"),
    "null": (b"null", None, "expected a JSON object, got null"),
    "empty line": (b"", None, "expected a JSON object, got an empty line"),
    "blank line": (b" \t", None, "expected a JSON object, got an empty line"),
    "too deep": (b"[" * 100_000, None, "expected a JSON object"),
    "missing question": (b'{"answer": "#### 1"}', "question", "expected such a field, the row has 'answer'"),
    "missing answer": (b'{"question": "x"}', "answer", "expected such a field, the row has 'question'"),
    "empty object": (b"{}", "question", "the row has none"),
    "question of wrong type": (b'{"question": 3, "answer": "#### 1"}', "question", "expected a string, got a number"),
    "question null": (b'{"question": null, "answer": "#### 1"}', "question", "expected a string, got null"),
    "answer of wrong type": (
        b'{"question": "x", "answer": ["1"]}',
        "answer",
        "expected a string or a number, got a list",
    ),
    "answer boolean": (b'{"question": "x", "answer": true}', "answer", "got a boolean"),
    "question empty": (b'{"question": "", "answer": "#### 1"}', "question", "expected text, got an empty string"),
    "answer blank": (b'{"question": "x", "answer": " \\n"}', "answer", "expected text, got an empty string"),
    "no ####": (b'{"question": "x", "answer": "1"}', "answer", 'expected a final answer after "####"'),
    "no number": (b'{"question": "x", "answer": "#### one"}', "answer", "expected a number after"),
    "not UTF-8": (b'{"question": "\xff", "answer": "#### 1"}', None, "expected UTF-8, got byte 0xff at byte 15"),
    "half a surrogate": (b'{"question": "\\ud800", "answer": "#### 1"}', "question", "half of a surrogate pair"),
}


def read(path, **knobs):
    return read_rows(path, prompt="question", answer="answer", extract=gold_answer, **knobs)


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_is_named_and_can_be_skipped(kind, tmp_path):
    raw, field, message = BAD[kind]
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join([GOOD, GOOD, raw, GOOD]) + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 3, field)
    where = f"{path}, line 3" + (f', field "{field}"' if field else "")
    assert str(caught.value).startswith(where + ": ")
    table = read(path, skip_bad_rows=True)
    assert table.prompts == ("one?",) * 3 and table.answers == ("1",) * 3
    assert table.skipped == (str(caught.value),)


def test_good_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        '{"question": "é\u2028?", "answer": "so\\n#### 1,000", "more": 1}',
        json.dumps({"question": "b", "answer": "#### 2"}),
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\r\n\n")
    table = read(path)
    assert table.prompts == ("é\u2028?", "b") and table.answers == ("1000", "2")
    assert table.solutions == ("so\n#### 1,000", "#### 2") and table.skipped == ()


def test_numbers_are_kept_as_written(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"q": "a", "a": 0.1000000000000000055}\n{"q": "b", "a": 123456789012345678901}\n')
    assert read_rows(path, prompt="q", answer="a").answers == ("0.1000000000000000055", "123456789012345678901")


def test_files_without_a_usable_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=r"no file .*rows\.jsonl"):
        read(path)
    for content in (b"", b"\n\n"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"rows\.jsonl: expected at least one usable row"):
            read(path)
    path.write_bytes(b"x\ny")
    with pytest.raises(DataError, match="2 bad ones were skipped"):
        read(path, skip_bad_rows=True)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    columns = {"q": ["a", None, "c"], "a": [1, 2, 3], "other": [0, 0, 0]}
    parquet.write_table(pyarrow.table(columns), path)
    with pytest.raises(DataError, match=r'rows\.parquet, row 2, field "q": expected a string, got null'):
        read_rows(path, prompt="q", answer="a")
    table = read_rows(path, prompt="q", answer="a", skip_bad_rows=True)
    assert table.prompts == ("a", "c") and table.answers == ("1", "3") and len(table.skipped) == 1
    with pytest.raises(DataError, match='field "question": expected such a column, the file has q, a, other'):
        read_rows(path, prompt="question", answer="a")
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="expected a parquet file"):
        read_rows(path, prompt="q", answer="a")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"):
        read_rows(path, prompt="q", answer="a")
