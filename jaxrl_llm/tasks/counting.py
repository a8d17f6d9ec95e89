"""Writing a mark a given number of times: responses whose lengths have a long tail.

The prompt is `37*a:`, the right response 37 times `a`, then EOS. The count is geometric, cut at `maximum`.

Grammar of a response, for both verifiers: its text is all characters before the first EOS (or all of them). It is
*well-formed* if it is one or more times the mark and nothing else, and *right* if it is so exactly `count` times.
Score: 1 if right, else `partial_credit` if well-formed, else 0.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrl_llm.tasks import characters as ch
from jaxrl_llm.tasks.procedural import check_knob, procedural_task, score
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts


def counting(
    *,
    mean: float = 16.0,
    maximum: int = 64,
    marks: str = "abcdefghijklmnopqrstuvwxyz",
    partial_credit: float = 0.0,
    rows: int = 4096,
) -> Task:
    """Counts from 1 to `maximum`, geometric: `P(count > n + 1) / P(count > n)` is constant below the maximum.

    Args:
      mean: of the geometric distribution before it is cut, in tokens, at least 2; the cut makes the mean smaller.
      maximum: largest count, from 4 to 4096; larger draws are drawn again.
      marks: characters that may have to be written; neither digits nor `*` nor `:`.
      partial_credit: for a well-formed wrong response, from 0 to below 1.
      rows: size of the id space of `Prompts.index`.

    Raises:
      ValueError: a knob out of its range, or so few problems that the splits could be empty.
    """
    check_knob("counting", "mean", mean, 2, 1e6)
    check_knob("counting", "maximum", maximum, 4, 4096)
    check_knob("counting", "partial_credit", partial_credit, 0, 0.999)
    if not marks or len(set(marks)) < len(marks) or set(marks) & set("0123456789*:") or not set(marks) <= set(ch.IDS):
        raise ValueError(f"counting: marks must be distinct characters other than digits, * and :, got {marks!r}")
    if len(marks) * min(mean, maximum) < 32:
        raise ValueError(f"counting: {len(marks)} marks, mean={mean}, maximum={maximum}: too few problems to split")
    width = len(str(maximum))
    return procedural_task(
        name="counting",
        rows=rows,
        prompt_length=width + 3,
        response_length=maximum + 1,
        words=2,
        propose=functools.partial(_propose, thresholds=_thresholds(mean, maximum), marks=marks),
        fingerprint=_fingerprint,
        render=functools.partial(_render, width=width),
        judge=functools.partial(_judge, partial_credit=partial_credit),
        solve=functools.partial(_solve, maximum=maximum),
        grade=functools.partial(grade_count, partial_credit=partial_credit),
        columns=_columns,
    )


def grade_count(
    prompts: list[str],
    completions: list[str],
    *,
    mark: list[str],
    count: list[int],
    partial_credit: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """The verifier on text; `mark` and `count` say what was asked, one each per completion."""
    return [
        1.0 if text == m * n else partial_credit if text and set(text) == {m} else 0.0
        for text, m, n in zip(completions, mark, count, strict=True)
    ]


def _thresholds(mean: float, maximum: int) -> np.ndarray:
    """`[maximum - 1]` uint32: `P(count <= n)` in units of `2**-32`; integers, so every device draws the same counts."""
    below = -np.expm1(np.arange(1, maximum + 1) * np.log1p(-1.0 / mean))
    return np.asarray(np.minimum(below[:-1] / below[-1] * 2.0**32, 2.0**32 - 1), np.uint32)


def _propose(noise: Array, *, thresholds: np.ndarray, marks: str) -> dict[str, Array]:
    place = jnp.sum(jnp.asarray(thresholds) <= noise[0])
    mark = jnp.array(ch.encode(marks))[ch.below(noise[1], len(marks))]
    return {"count": place.astype(jnp.int32) + 1, "mark": mark}


def _fingerprint(problem: dict[str, Array]) -> Array:
    return ch.fingerprint(jnp.stack([problem["count"], problem["mark"]]))


def _render(problem: dict[str, Array], *, width: int) -> ch.Piece:
    pieces = [ch.number(problem["count"], width), ch.literal("*"), ch.symbol(problem["mark"]), ch.literal(":")]
    return ch.join(pieces, width + 3)


def _judge(problem: dict[str, Array], tokens: Array, length: Array, *, partial_credit: float) -> Array:
    formed = ch.consists_of(tokens, length, problem["mark"][None])
    return score(formed & (length == problem["count"]), formed, partial_credit)


def _solve(noise: Array, problem: dict[str, Array], *, maximum: int) -> tuple[ch.Piece, ch.Piece]:
    """The answer, and one that is one mark too long or too short."""
    count = problem["count"]
    longer = ((count == 1) | (noise % 2 == 0)) & (count < maximum)
    right, wrong = (_repeat(problem["mark"], n, maximum) for n in (count, jnp.where(longer, count + 1, count - 1)))
    return right, wrong


def _repeat(mark: Array, count: Array, maximum: int) -> ch.Piece:
    marks = (jnp.full(maximum, mark), jnp.arange(maximum) < count)
    return ch.join([marks, ch.end()], maximum + 1)


def _columns(prompts: Prompts) -> dict[str, list[Any]]:
    marks = [ch.decode([i]) for i in np.asarray(prompts.target["mark"])]
    return {"mark": marks, "count": np.asarray(prompts.target["count"]).tolist()}
