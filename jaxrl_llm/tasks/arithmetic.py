r"""Addition with worked column steps.

The prompt is `347+586=`. A worked response names each column, lowest first, with the carry it received, then the sum:
`7+6=13;4+8+1=13;3+5+1=9>933`, then EOS. A carry of 0 is not written.

Grammar of a response, for both verifiers: its text is all characters before the first EOS (or all of them). The
*answer* is what follows the last `>`; a text without `>` has none. An answer is *well-formed* if it is one or more
digits, and *right* if it is exactly the decimal digits of the sum, without leading zeros, spaces or anything else.
The steps are not looked at. Score: 1 if right, else `partial_credit` if well-formed, else 0.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrl_llm.tasks import characters as ch
from jaxrl_llm.tasks.procedural import check_knob, procedural_task, score
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts


def arithmetic(*, digits: int = 3, operands: int = 2, partial_credit: float = 0.0, rows: int = 4096) -> Task:
    """Sums of `operands` numbers of exactly `digits` digits.

    Args:
      digits: from 1 to 64. A worked response takes at most `10 * digits` tokens for two operands, EOS included.
      operands: from 2 to 10.
      partial_credit: for a well-formed wrong answer, from 0 to below 1.
      rows: size of the id space of `Prompts.index`.

    Raises:
      ValueError: a knob out of its range.
    """
    check_knob("arithmetic", "digits", digits, 1, 64)
    check_knob("arithmetic", "operands", operands, 2, 10)
    check_knob("arithmetic", "partial_credit", partial_credit, 0, 0.999)
    response_length = digits * (2 * operands + 6) + 2  # the longest worked response, and a carry invented in column one
    return procedural_task(
        name="arithmetic",
        rows=rows,
        prompt_length=operands * (digits + 1),
        response_length=response_length,
        words=operands * digits,
        propose=functools.partial(_propose, shape=(operands, digits)),
        fingerprint=_fingerprint,
        render=_render,
        judge=functools.partial(_judge, partial_credit=partial_credit),
        solve=functools.partial(_solve, length=response_length),
        grade=functools.partial(grade_sum, partial_credit=partial_credit),
        columns=_columns,
    )


def grade_sum(
    prompts: list[str], completions: list[str], *, answer: list[str], partial_credit: float = 0.0, **_: Any
) -> list[float | None]:
    """The verifier on text; `answer` is the sum's digits, one string per completion."""
    return [_grade(text, right, partial_credit) for text, right in zip(completions, answer, strict=True)]


def worked(rng: np.random.Generator, *operands: int, right: float) -> str:
    """A worked response in which each carry is forgotten with probability `1 - right`, independently.

    A forgotten carry is missing from its column's step and from everything that follows; the carry out of the last
    column is part of that column's total and never forgotten. `right=1` is the worked solution.
    """
    width = len(str(max(operands)))
    columns = [[int(d) for d in column] for column in zip(*(str(n).zfill(width) for n in operands), strict=True)]
    steps, result, carry = [], "", 0
    for column in reversed(columns):
        carry = carry if carry and rng.random() < right else 0
        total = sum(column) + carry
        steps.append("+".join(str(term) for term in column + [carry] * (carry > 0)) + f"={total}")
        carry, result = total // 10, str(total % 10) + result
    return ";".join(steps) + ">" + (str(carry) + result).lstrip("0").rjust(1, "0")


def _grade(text: str, right: str, partial_credit: float) -> float:
    _, marker, answer = text.rpartition(">")
    if marker and answer == right:
        return 1.0
    return partial_credit if marker and answer and set(answer) <= set("0123456789") else 0.0


def _propose(noise: Array, shape: tuple[int, int]) -> dict[str, Array]:
    least = jnp.array([int(shape[1] > 1)] + [0] * (shape[1] - 1))
    return {"operands": least + ch.below(noise.reshape(shape), 10 - least)}


def _fingerprint(problem: dict[str, Array]) -> Array:
    """Equal for the same operands in another order, so that `a+b` and `b+a` are in the same split."""
    return ch.mix(jnp.sum(jax.vmap(ch.fingerprint)(problem["operands"]), dtype=jnp.uint32))


def _render(problem: dict[str, Array]) -> ch.Piece:
    operands, digits = problem["operands"].shape
    signs = [ch.literal("+")] * (operands - 1) + [ch.literal("=")]
    pieces = [p for numeral, sign in zip(problem["operands"], signs, strict=True) for p in (ch.digits(numeral), sign)]
    return ch.join(pieces, operands * (digits + 1))


def _add(operands: Array, slip: Array) -> tuple[Array, Array, Array]:
    """Column addition, lowest first: carries `[D]`, totals `[D]`, and the digits of the sum `[D + 1]`, highest first.

    Where `slip [D]`, a column forgets the carry it received, or invents one if there was none.
    """

    def column(carry: Array, inputs: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        digits, slips = inputs
        carry = jnp.where(slips, (carry == 0).astype(carry.dtype), carry)
        total = digits + carry
        return total // 10, (carry, total)

    last, (carries, totals) = jax.lax.scan(column, jnp.zeros((), operands.dtype), (operands.sum(0)[::-1], slip))
    return carries, totals, jnp.concatenate([last[None], totals[::-1] % 10])


def _judge(problem: dict[str, Array], tokens: Array, length: Array, *, partial_credit: float) -> Array:
    operands = problem["operands"]
    _, _, total = _add(operands, jnp.zeros(operands.shape[1], bool))
    expected, kept = ch.join([ch.digits(total)], operands.shape[1] + 1)
    answer, size, found = ch.after_last(tokens, length, ">")
    right = found & ch.equals(answer, size, expected, kept.sum())
    formed = found & ch.consists_of(answer, size, ch.ZERO + jnp.arange(10))
    return score(right, formed, partial_credit)


def _solve(noise: Array, problem: dict[str, Array], *, length: int) -> tuple[ch.Piece, ch.Piece]:
    """The worked response, and one with a slip in one column, which always changes the sum."""
    operands = problem["operands"]
    width = operands.shape[1]
    slip = jnp.arange(width) == ch.below(noise, width)
    return _write(operands, jnp.zeros(width, bool), length), _write(operands, slip, length)


def _write(operands: Array, slip: Array, length: int) -> ch.Piece:
    carries, totals, answer = _add(operands, slip)
    steps = jax.vmap(_step)(operands.T[::-1], carries, totals, jnp.arange(len(totals)) < len(totals) - 1)
    return ch.join([steps, ch.literal(">"), ch.digits(answer), ch.end()], length)


def _step(column: Array, carry: Array, total: Array, more: Array) -> ch.Piece:
    """`4+8+1=13;`, the semicolon if `more` columns follow."""
    terms = [p for digit in column for p in (ch.symbol(digit + ch.ZERO), ch.literal("+"))][:-1]
    plus = ch.symbol(jnp.array(ch.IDS["+"]), carry > 0)
    pieces = [*terms, plus, ch.symbol(carry + ch.ZERO, carry > 0), ch.literal("="), ch.number(total, 2)]
    pieces.append(ch.symbol(jnp.array(ch.IDS[";"]), more))
    tokens, keep = (jnp.concatenate([piece[i] for piece in pieces]) for i in (0, 1))
    return tokens, keep


def _columns(prompts: Prompts) -> dict[str, list[Any]]:
    operands = np.asarray(prompts.target["operands"]).tolist()
    return {"answer": [str(sum(int("".join(map(str, n))) for n in row)) for row in operands]}
