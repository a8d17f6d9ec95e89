"""What a task is: prompts, a verifier, and the same verifier on text."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jax import Array

from jaxrl_llm.types import Logged, Prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What happened to the rows of a file on their way into a task: nothing is cut or dropped silently.

    train, test: rows kept.
    skipped: one message (file, line, field, what was expected) for every row left out.
    cut_train, cut_test: prompts longer than `prompt_length`, of which only the end is kept.
    cut_responses: logged responses longer than `response_length`, of which only the start is kept (without EOS).
    shared: test prompts that are also training prompts, word for word.
    longest: tokens of the longest prompt, before cutting.
    """

    train: int
    test: int
    skipped: tuple[str, ...] = ()
    cut_train: int = 0
    cut_test: int = 0
    cut_responses: int = 0
    shared: int = 0
    longest: int = 0

    def __str__(self) -> str:
        parts = [f"{self.train} training and {self.test} test rows, longest prompt {self.longest} tokens"]
        counts = {
            "bad rows skipped": len(self.skipped),
            "training prompts cut on the left": self.cut_train,
            "test prompts cut on the left": self.cut_test,
            "logged responses cut on the right": self.cut_responses,
            "test prompts that are also training prompts": self.shared,
        }
        return "; ".join(parts + [f"{n} {what}" for what, n in counts.items() if n])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Prompts and the verifier of their responses.

    name: what `tasks.load` calls it.
    tokenizer: a `transformers` tokenizer with an EOS and a padding token, which must differ.
    rows: `P`, rows of the data set; for a procedural task the size of the hashed id space of `Prompts.index`.
    prompt_length: `S`. response_length: `T`, the default budget.
    test: `(n) -> Prompts`: the first `n` held-out problems, always the same, never drawn for training.
    draw: `(key, n) -> Prompts` from the training split, in the graph; None for data that lives on the host.
    verify: `(Prompts, tokens [B G T], mask [B G T]) -> [B G]` float32, in the graph; None if only `grade` can.
    grade: `(prompts, completions, **columns) -> list[float | None]`, the same verifier on text, called with keywords;
        None where it cannot score. A plain reward function of the usual trainers fits.
    columns: `(Prompts) -> {name: list of length B}`, what `grade` is given besides the text.
    batches: `(seed, n, start=0) -> Iterator[Prompts]`, endless shuffled epochs of host data from batch `start` on,
        each row once per epoch; None for a procedural task. With an argument `part`, a slice of `n`, it can read those
        rows of each batch alone: what a run in several processes asks each of them for.
    stop: stop sequences, as token ids.
    demonstrate: `(key, Prompts) -> Logged [B 2 T]`, in the graph: row 0 a right response (reward 1), row 1 a plausible
        wrong one (reward 0).
    report: what happened to the rows of the file, for host data.

    Raises:
      ValueError: the tokenizer lacks EOS or padding or uses one token for both, or there is no source of prompts.
    """

    name: str
    tokenizer: Any
    rows: int
    prompt_length: int
    response_length: int
    test: Callable[[int], Prompts]
    grade: Callable[..., list[float | None]]
    columns: Callable[[Prompts], dict[str, list[Any]]]
    draw: Callable[[Array, int], Prompts] | None = None
    verify: Callable[[Prompts, Array, Array], Array] | None = None
    batches: Callable[..., Iterator[Prompts]] | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    demonstrate: Callable[[Array, Prompts], Logged] | None = None
    report: Report | None = None

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.name)
        if (self.draw is None) == (self.batches is None):
            raise ValueError(f"task {self.name} needs either draw (procedural) or batches (host data), and not both")
        for field in ("rows", "prompt_length", "response_length"):
            if getattr(self, field) < 1:
                raise ValueError(f"task {self.name}: {field} must be at least 1, got {getattr(self, field)}")


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raises ValueError, saying what to do, if the tokenizer has no EOS, no padding, or one token for both."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if eos is None:
        raise ValueError(f"task {name}: the tokenizer has no EOS token; set tokenizer.eos_token")
    if pad is None or pad == eos:
        state = "has no padding token" if pad is None else "pads with its EOS token, which would hide the trained EOS"
        raise ValueError(f"task {name}: the tokenizer {state}; set tokenizer.pad_token to another special token")


def decode_responses(tokenizer: Any, tokens: Any, mask: Any) -> list[list[str]]:
    """The text of each response: its masked tokens up to the first EOS, special tokens spelled out.

    Args:
      tokens: `[B G T]` integers. Ids the tokenizer does not know become U+FFFD.
      mask: `[B G T]` bool; masked-out tokens are left out.
    """
    rows = [_kept(row, keep, tokenizer.eos_token_id) for row, keep in _rows(tokens, mask)]
    texts = iter(_decode(tokenizer, rows))
    return [[next(texts) for _ in range(np.shape(tokens)[1])] for _ in range(np.shape(tokens)[0])]


def decode_prompts(tokenizer: Any, prompts: Prompts) -> list[str]:
    """The text of each prompt, special tokens spelled out."""
    rows = _rows(prompts.context.tokens, prompts.context.mask)
    return _decode(tokenizer, [_kept(row, keep, None) for row, keep in rows])


def host_verifier(task: Task) -> Callable[[Prompts, Any, Any], np.ndarray]:
    """`(Prompts, tokens [B G T], mask [B G T]) -> [B G]` float32 by `task.grade` on text; NaN where it gave None.

    A prompt and its columns are repeated for each of its `G` responses. The function returned raises TypeError or
    ValueError, naming the verifier, if the verifier does not return one finite number or None for each response.
    """
    return functools.partial(_grade, task)


def pad_tokens(rows: Sequence[Sequence[int]], length: int, side: str, pad: int = 0) -> tuple[Any, Any, Any]:
    """Right-padded rows; over-long ones are cut on `side` ("left" keeps the end of the row, "right" its start).

    Returns:
      `(tokens [N length] int32, mask [N length] bool, cut [N] bool)`, numpy; `cut` marks the rows that were too long.
    """
    if side not in ("left", "right"):
        raise ValueError(f'side must be "left" or "right", got {side!r}')
    tokens = np.full((len(rows), length), pad, np.int32)
    lengths = np.array([len(row) for row in rows], np.int64).reshape(len(rows))
    for i, row in enumerate(rows):
        kept = row[max(0, len(row) - length) :] if side == "left" else row[:length]
        tokens[i, : len(kept)] = kept
    return tokens, np.arange(length) < lengths[:, None], lengths > length


def _rows(tokens: Any, mask: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    tokens, mask = np.asarray(tokens), np.asarray(mask, bool)
    width = tokens.shape[-1]
    return zip(tokens.reshape(-1, width), mask.reshape(-1, width), strict=True)


def _kept(row: np.ndarray, keep: np.ndarray, eos: int | None) -> list[int]:
    ids: list[int] = row[keep].tolist()
    return ids[: ids.index(eos)] if eos in ids else ids


def _decode(tokenizer: Any, rows: list[list[int]]) -> list[str]:
    size = len(tokenizer)
    if all(0 <= i < size for row in rows for i in row):
        return list(tokenizer.batch_decode(rows, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    # Fast tokenizers drop unknown ids without a word, which would join what stands on both sides.
    return ["\ufffd".join(_decode(tokenizer, _known_runs(row, size))) for row in rows]


def _known_runs(row: list[int], size: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    for i in row:
        if 0 <= i < size:
            runs[-1].append(i)
        else:
            runs.append([])
    return runs


def _grade(task: Task, prompts: Prompts, tokens: Any, mask: Any) -> np.ndarray:
    shape = np.shape(tokens)[:2]
    name = _name(task.grade)
    responses = decode_responses(task.tokenizer, tokens, mask)
    columns = {key: _repeat(list(column), shape, key, task) for key, column in task.columns(prompts).items()}
    try:
        scores = task.grade(
            prompts=_repeat(decode_prompts(task.tokenizer, prompts), shape, "prompts", task),
            completions=[text for group in responses for text in group],
            **columns,
        )
    except Exception as error:
        error.add_note(f"raised in the verifier {name} of task {task.name}")
        raise
    if not isinstance(scores, list | tuple | np.ndarray):
        raise TypeError(f"the verifier {name} must return a list of numbers or None, got {type(scores).__name__}")
    if len(scores) != math.prod(shape):
        raise ValueError(
            f"the verifier {name} must return one score for each of the {math.prod(shape)} responses, got {len(scores)}"
        )
    return np.array([_score(score, i, name) for i, score in enumerate(scores)], np.float32).reshape(shape)


def _repeat(column: list[Any], shape: tuple[int, ...], key: str, task: Task) -> list[Any]:
    if len(column) != shape[0]:
        raise ValueError(f"task {task.name}: column {key!r} has {len(column)} values for {shape[0]} prompts")
    return [value for value in column for _ in range(shape[1])]


def _score(score: Any, i: int, name: str) -> float:
    if score is None:
        return math.nan
    if not isinstance(score, numbers.Real | np.bool_):
        raise TypeError(f"the verifier {name} must return numbers or None; for response {i} it gave {score!r}")
    if math.isinf(score):
        raise ValueError(f"the verifier {name} gave {score!r} for response {i}; scores must be finite, or None")
    return float(score)


def _name(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__name__)
