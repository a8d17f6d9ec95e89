"""Rows of JSONL and parquet files, checked one by one before anything else runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any


class DataError(ValueError):
    """A row that cannot be used: which file, which line (or row, from 1), which field, and what was expected."""

    def __init__(self, file: Path | str, line: int | None, field: str | None, problem: str, unit: str = "line") -> None:
        self.file, self.line, self.field, self.problem = str(file), line, field, problem
        place = [str(file)] + [f"{unit} {line}"] * (line is not None) + [f'field "{field}"'] * (field is not None)
        super().__init__(f"{', '.join(place)}: {problem}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """The usable rows of a file.

    prompts, solutions, answers: one string a row; `solutions` is the answer column as written, `answers` what the
        verifier compares with.
    skipped: one message for every row left out.
    """

    prompts: tuple[str, ...]
    solutions: tuple[str, ...]
    answers: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def as_written(text: str) -> str:
    """The answer, unchanged."""
    return text


def read_rows(
    path: Path | str,
    *,
    prompt: str,
    answer: str,
    extract: Callable[[str], str] = as_written,
    skip_bad_rows: bool = False,
) -> Table:
    """The named prompt and answer columns of a `.parquet` file, or of any other as JSON lines (UTF-8).

    A prompt is a string that is not blank; an answer may also be a number, kept digit by digit as written. Blank lines
    at the end of the file are ignored.

    Args:
      prompt, answer: names of the columns.
      extract: `(answer) -> what the verifier compares with`; its ValueError makes the row a bad one.
      skip_bad_rows: leave bad rows out (they are in `Table.skipped`) instead of raising.

    Raises:
      DataError: a bad row, or no usable row at all.
      FileNotFoundError: no such file.
      ImportError: a parquet file without pyarrow installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    parquet = path.suffix == ".parquet"
    source: Iterator[tuple[int, Any]] = _parquet(path, (prompt, answer)) if parquet else _lines(path)
    kept: list[tuple[str, str, str]] = []
    skipped: list[str] = []
    for line, raw in source:
        try:
            row = raw if parquet else _object(raw)
            kept.append(_row(row, prompt, answer, extract))
        except _Bad as bad:
            error = DataError(path, line, bad.field, bad.problem, "row" if parquet else "line")
            if not skip_bad_rows:
                raise error from None
            skipped.append(str(error))
    if not kept:
        raise DataError(path, None, None, f"expected at least one usable row, {len(skipped)} bad ones were skipped")
    prompts, solutions, answers = zip(*kept, strict=True)
    return Table(prompts=prompts, solutions=solutions, answers=answers, skipped=tuple(skipped))


class _Bad(Exception):
    def __init__(self, field: str | None, problem: str) -> None:
        self.field, self.problem = field, problem
        super().__init__(problem)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    return enumerate(lines if lines != [b""] else [], start=1)


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{path}: parquet files need pyarrow; pip install pyarrow, or use JSON lines") from error
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, None, None, f"expected a parquet file: {error}") from None
    names = file.schema_arrow.names
    if missing := [column for column in columns if column not in names]:
        raise DataError(path, None, missing[0], f"expected such a column, the file has {', '.join(names)}")
    batches = file.iter_batches(columns=list(dict.fromkeys(columns)))
    return enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def _object(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise _Bad(None, "expected a JSON object, got an empty line")
    try:
        row = json.loads(raw.decode("utf-8"), parse_float=Decimal, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _Bad(None, f"expected UTF-8, got byte 0x{raw[error.start]:02x} at byte {error.start + 1}") from None
    except json.JSONDecodeError as error:
        raise _Bad(None, f"expected a JSON object, got invalid JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise _Bad(None, f"expected a JSON object, got invalid JSON ({error})") from None
    if not isinstance(row, dict):
        raise _Bad(None, f"expected a JSON object, got {_kind(row)}")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _row(row: dict[str, Any], prompt: str, answer: str, extract: Callable[[str], str]) -> tuple[str, str, str]:
    question = _text(row, prompt, numbers=False)
    solution = _text(row, answer, numbers=True)
    try:
        return question, solution, extract(solution)
    except ValueError as error:
        raise _Bad(answer, str(error)) from None


def _text(row: dict[str, Any], field: str, *, numbers: bool) -> str:
    if field not in row:
        raise _Bad(field, f"expected such a field, the row has {', '.join(map(repr, row)) or 'none'}")
    value = row[field]
    if numbers and isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise _Bad(field, f"expected a string{' or a number' if numbers else ''}, got {_kind(value)}")
    if not value.strip():
        raise _Bad(field, "expected text, got an empty string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Bad(field, "expected Unicode text, got half of a surrogate pair") from None
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float | Decimal) else type(value).__name__)
