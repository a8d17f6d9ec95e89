"""Reaching a target from given numbers with `+`, `-`, `*` and parentheses, each number exactly once.

The prompt is `3,7,12=45:`, a right response `(3+12)*3` for numbers that allow it, then EOS.

Grammar of a response, for both verifiers: its text is all characters before the first EOS (or all of them) and must be

    sum     = product { ("+" | "-") product }
    product = factor { "*" factor }
    factor  = number | "(" sum ")"
    number  = a digit from 1 to 9 { digit }

without spaces, signs or leading zeros and with at most `DEPTH` parentheses open at once. It is *well-formed* if it
follows this grammar, uses each given number exactly once (a number given twice, twice) and nothing else, and no
intermediate result is beyond +-`LIMIT`: products are taken left to right, then sums left to right. It is *right* if its
value is the target. Score: 1 if right, else `partial_credit` if well-formed, else 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrl_llm.tasks import characters as ch
from jaxrl_llm.tasks.procedural import check_knob, procedural_task, score
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts

DEPTH = 8
LIMIT = 10**9  # so that a sum or difference of two intermediate results fits into int32
PLUS, MINUS, TIMES = range(3)


def countdown(
    *, numbers: int = 3, largest: int = 12, limit: int = 99, partial_credit: float = 0.0, rows: int = 4096
) -> Task:
    """Targets made from `numbers` numbers, so that each can be reached.

    Args:
      numbers: how many are given, from 2 to 6.
      largest: of the given numbers, from 5 to 99; the smallest is 1.
      limit: largest target and largest intermediate result of the hidden solution, from `2 * largest` to 9999. The
        smallest target is 1.
      partial_credit: for a well-formed response with another value, from 0 to below 1.
      rows: size of the id space of `Prompts.index`.

    Raises:
      ValueError: a knob out of its range.
    """
    check_knob("countdown", "numbers", numbers, 2, 6)
    check_knob("countdown", "largest", largest, 5, 99)
    check_knob("countdown", "limit", limit, 2 * largest, 9999)
    check_knob("countdown", "partial_credit", partial_credit, 0, 0.999)
    width = len(str(largest))
    response_length = numbers * width + 3 * (numbers - 1) + 1
    return procedural_task(
        name="countdown",
        rows=rows,
        prompt_length=numbers * (width + 1) + len(str(limit)) + 1,
        response_length=response_length,
        words=3 * numbers - 1,
        propose=functools.partial(_propose, numbers=numbers, largest=largest, limit=limit),
        fingerprint=_fingerprint,
        render=functools.partial(_render, width=width, target_width=len(str(limit))),
        judge=functools.partial(_judge, partial_credit=partial_credit),
        solve=functools.partial(_solve, width=width, length=response_length),
        grade=functools.partial(grade_expression, partial_credit=partial_credit),
        columns=_columns,
    )


def grade_expression(
    prompts: list[str],
    completions: list[str],
    *,
    numbers: list[list[int]],
    target: list[int],
    partial_credit: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """The verifier on text; `numbers` and `target` say what was asked, one each per completion."""
    values = [evaluate(text, given) for text, given in zip(completions, numbers, strict=True)]
    return [
        0.0 if value is None else 1.0 if value == wanted else partial_credit
        for value, wanted in zip(values, target, strict=True)
    ]


def evaluate(text: str, numbers: list[int]) -> int | None:
    """The value of a well-formed expression of exactly `numbers`, or None; see the grammar above."""
    pieces = re.findall(r"[1-9][0-9]*|[-+*()]|[\s\S]", text)
    used = [piece for piece in pieces if piece[0] in "123456789"]
    if sorted(used) != sorted(map(str, numbers)):
        return None
    stream = iter([*pieces, ""])
    try:
        value, last = _sum(stream, 0)
    except ValueError:
        return None
    return value if last == "" else None


def _sum(stream: Iterator[str], depth: int) -> tuple[int, str]:
    """The value of the sum that starts here, and the piece after it."""
    value, operator = _product(stream, depth)
    while operator in ("+", "-"):
        term, following = _product(stream, depth)
        value, operator = _within(value + term if operator == "+" else value - term), following
    return value, operator


def _product(stream: Iterator[str], depth: int) -> tuple[int, str]:
    value = _factor(stream, depth)
    while (operator := next(stream)) == "*":
        value = _within(value * _factor(stream, depth))
    return value, operator


def _factor(stream: Iterator[str], depth: int) -> int:
    piece = next(stream)
    if piece == "(" and depth < DEPTH:
        value, last = _sum(stream, depth + 1)
        if last == ")":
            return value
    elif piece and piece[0] in "123456789":
        return int(piece)
    raise ValueError("not in the grammar")


def _within(value: int) -> int:
    if abs(value) > LIMIT:
        raise ValueError("beyond the limit")
    return value


def _propose(noise: Array, *, numbers: int, largest: int, limit: int) -> dict[str, Array]:
    """Random numbers and a random chain of operators over them whose every result is from 1 to `limit`."""
    given = 1 + ch.below(noise[:numbers], largest)
    order = jnp.argsort(noise[numbers : 2 * numbers])

    def extend(value: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        number, word = inputs
        results = jnp.stack([value + number, value - number, value * number])
        operator = ch.choose(word, (results >= 1) & (results <= limit))
        return results[operator], operator

    chain = given[order]
    target, operators = jax.lax.scan(extend, chain[0], (chain[1:], noise[2 * numbers :]))
    return {"numbers": given, "target": target, "order": order, "operators": operators}


def _fingerprint(problem: dict[str, Array]) -> Array:
    """Of the numbers in any order, and the target."""
    return ch.fingerprint(jnp.append(jnp.sort(problem["numbers"]), problem["target"]))


def _render(problem: dict[str, Array], *, width: int, target_width: int) -> ch.Piece:
    given = problem["numbers"]
    signs = [ch.literal(",")] * (len(given) - 1) + [ch.literal("=")]
    pieces = [p for n, sign in zip(given, signs, strict=True) for p in (ch.number(n, width), sign)]
    pieces += [ch.number(problem["target"], target_width), ch.literal(":")]
    return ch.join(pieces, len(given) * (width + 1) + target_width + 1)


def _solve(noise: Array, problem: dict[str, Array], *, width: int, length: int) -> tuple[ch.Piece, ch.Piece]:
    """The hidden chain, and the chain with another last operator, which always has another value (all are >= 1)."""
    operators = problem["operators"]
    other = jnp.where(operators[-1] == MINUS, PLUS, MINUS)
    chain = problem["numbers"][problem["order"]]
    right, wrong = (_write(chain, ops, width, length) for ops in (operators, operators.at[-1].set(other)))
    return right, wrong


def _write(chain: Array, operators: Array, width: int, length: int) -> ch.Piece:
    """The chain as text, with parentheses around a sum that is multiplied."""
    sums = jnp.concatenate([jnp.zeros(1, bool), operators[:-1] != TIMES])
    closing = sums & (operators == TIMES)
    opening = jnp.arange(len(operators)) < closing.sum()
    pieces = [(jnp.full(len(operators), ch.IDS["("]), opening), ch.number(chain[0], width)]
    for i, operator in enumerate(operators):
        sign = jnp.array(ch.encode("+-*"))[operator]
        pieces += [ch.symbol(jnp.array(ch.IDS[")"]), closing[i]), ch.symbol(sign), ch.number(chain[i + 1], width)]
    return ch.join([*pieces, ch.end()], length)


def _judge(problem: dict[str, Array], tokens: Array, length: Array, *, partial_credit: float) -> Array:
    value, formed = _evaluate(tokens, length, problem["numbers"])
    return score(formed & (value == problem["target"]), formed, partial_credit)


def _evaluate(tokens: Array, length: Array, numbers: Array) -> tuple[Array, Array]:
    """The value `[]` of an expression `[T]`, and whether it is well-formed `[]`.

    A stack machine: each open parenthesis has a level with the sum so far, the sign of the product in progress and
    that product.
    """
    inside = jnp.arange(tokens.shape[0]) < length
    is_digit = inside & (tokens >= ch.ZERO) & (tokens < ch.ZERO + 10)
    last_digit = is_digit & ~jnp.append(is_digit[1:], False)
    levels = jnp.zeros(DEPTH + 1, jnp.int32)
    state = {
        "total": levels,
        "sign": levels + 1,
        "product": levels + 1,
        "depth": jnp.int32(0),
        "number": jnp.int32(0),
        "operand": jnp.array(False),  # the last piece was an operand, so an operator or ")" must follow
        "used": jnp.zeros(numbers.shape, bool),
        "bad": jnp.array(False),
    }
    step = functools.partial(_read, numbers)
    state, _ = jax.lax.scan(step, state, (tokens, inside, is_digit, last_digit))
    value = state["total"][0] + state["sign"][0] * state["product"][0]
    closed = state["operand"] & (state["depth"] == 0) & state["used"].all()
    return value, closed & ~state["bad"] & (jnp.abs(value) <= LIMIT)


def _read(numbers: Array, s: dict[str, Array], inputs: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
    """One character. Wherever `bad` is set nothing else matters any more."""
    token, inside, is_digit, last_digit = inputs
    opens, closes, times, plus, minus = (inside & (token == ch.IDS[c]) for c in "()*+-")
    depth, operand = s["depth"], s["operand"]
    below = jnp.maximum(depth - 1, 0)

    # A number in progress is above 0, because the first digit is; no given number reaches the cap.
    number = jnp.minimum(s["number"] * 10 + token - ch.ZERO, 10**6)
    free = (numbers == number) & ~s["used"]
    taken = last_digit & (jnp.arange(free.shape[0]) == jnp.argmax(free))

    total = s["total"][depth] + s["sign"][depth] * s["product"][depth]
    level = jnp.where(closes, below, depth)
    factor = jnp.where(closes, total, number)
    product = s["product"][level]
    finishes = last_digit | closes
    too_large = jnp.abs(product) > LIMIT // jnp.maximum(jnp.abs(factor), 1)

    adds = plus | minus
    misplaced = jnp.where(is_digit | opens, operand, ~operand) | (is_digit & (number == 0))
    misplaced |= ~(is_digit | opens | closes | times | adds) | (opens & (depth == DEPTH)) | (closes & (depth == 0))
    wrong = (last_digit & ~free.any()) | (finishes & too_large) | ((closes | adds) & (jnp.abs(total) > LIMIT))

    here, fresh = jnp.arange(DEPTH + 1) == level, jnp.arange(DEPTH + 1) == depth + 1
    state = {
        "total": jnp.where(here & adds, total, jnp.where(fresh & opens, 0, s["total"])),
        "sign": jnp.where(here & adds, jnp.where(minus, -1, 1), jnp.where(fresh & opens, 1, s["sign"])),
        "product": jnp.where(
            here & finishes, product * factor, jnp.where((here & adds) | (fresh & opens), 1, s["product"])
        ),
        "depth": jnp.where(opens, depth + 1, level),
        "number": jnp.where(is_digit & ~last_digit, number, 0),
        "operand": jnp.where(inside, finishes, operand),
        "used": s["used"] | taken,
        "bad": s["bad"] | (inside & (misplaced | wrong)),
    }
    return state, None


def _columns(prompts: Prompts) -> dict[str, list[Any]]:
    target = prompts.target
    return {"numbers": np.asarray(target["numbers"]).tolist(), "target": np.asarray(target["target"]).tolist()}
