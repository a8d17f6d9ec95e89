"""Any JSONL or parquet file with a prompt and an answer column."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrl_llm.tasks.answers import grade_answer
from jaxrl_llm.tasks.host import host_task
from jaxrl_llm.tasks.rows import DataError, Table, read_rows
from jaxrl_llm.tasks.task import Task


def jsonl(
    *,
    data: Path | str,
    test: Path | str | None = None,
    prompt: str = "prompt",
    answer: str = "answer",
    grade: Callable[..., list[float | None]] = grade_answer,
    tokenizer: Any = None,
    vocab_size: int = 2048,
    prompt_length: int = 256,
    response_length: int = 256,
    template: str | None = None,
    skip_bad_rows: bool = False,
    logged: bool = False,
) -> Task:
    """Rows of files with named columns.

    Args:
      data: a file (`.parquet`, otherwise JSON lines), or a folder with `train` and `test` files of either kind.
      test: the file of held-out rows. Without it and with a single file, one prompt in ten is held out, chosen by a
          hash of its text.
      prompt, answer: names of the columns.
      grade: the verifier, called with `prompts`, `completions` and `answer`.
      tokenizer, vocab_size, prompt_length, response_length, template, skip_bad_rows, logged: as in `gsm8k`; the
          template's field is the name of the prompt column.

    Raises:
      DataError: a malformed row, by file, line and field, before anything else runs.
      FileNotFoundError: a file is missing.
    """
    train_file, test_file = _files(Path(data), None if test is None else Path(test))
    train = read_rows(train_file, prompt=prompt, answer=answer, skip_bad_rows=skip_bad_rows)
    if test_file is None:
        train, held_out = _split(train, train_file)
    else:
        held_out = read_rows(test_file, prompt=prompt, answer=answer, skip_bad_rows=skip_bad_rows)
    return host_task(
        name="jsonl",
        train=train,
        test=held_out,
        field=prompt,
        grade=grade,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        prompt_length=prompt_length,
        response_length=response_length,
        template=template,
        logged=logged,
    )


def _files(data: Path, test: Path | None) -> tuple[Path, Path | None]:
    if not data.is_dir():
        return data, test
    found = {}
    for part in ("train", "test"):
        candidates = [data / f"{part}{suffix}" for suffix in (".jsonl", ".parquet")]
        existing = [path for path in candidates if path.is_file()]
        if not existing and (part == "train" or test is None):
            raise FileNotFoundError(f"no {part}.jsonl or {part}.parquet in {data}")
        found[part] = existing[0] if existing else None
    assert found["train"] is not None
    return found["train"], test or found["test"]


def _split(table: Table, file: Path) -> tuple[Table, Table]:
    held_out = [int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10 == 0 for text in table.prompts]
    if all(held_out) or not any(held_out):
        raise DataError(file, None, None, f"{len(held_out)} rows are too few to hold some out; give the test file")
    return _where(table, [not held for held in held_out], table.skipped), _where(table, held_out, ())


def _where(table: Table, keep: list[bool], skipped: tuple[str, ...]) -> Table:
    def chosen(column: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(value for value, kept in zip(column, keep, strict=True) if kept)

    return Table(
        prompts=chosen(table.prompts),
        solutions=chosen(table.solutions),
        answers=chosen(table.answers),
        skipped=skipped,
    )
