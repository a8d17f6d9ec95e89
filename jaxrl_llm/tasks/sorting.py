"""Rewriting a string by a rule.

The prompt is the rule, a space, the string and a colon: `up cab:`, `down cab:`, `back cab:`, `copy cab:`. The rules are
ascending, descending, reversed and unchanged order.

Grammar of a response, for both verifiers: its text is all characters before the first EOS (or all of them). It is
*right* if it is exactly the rewritten string, and *well-formed* if it has the right length and only symbols of the
task. Score: 1 if right, else `partial_credit` if well-formed, else 0.
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

RULES = ("up", "down", "back", "copy")
WIDTH = max(map(len, RULES))
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def sorting(
    *,
    shortest: int = 3,
    longest: int = 8,
    rules: tuple[str, ...] = RULES,
    symbols: str = LETTERS,
    partial_credit: float = 0.0,
    rows: int = 4096,
) -> Task:
    """Strings of `shortest` to `longest` symbols, each length equally likely.

    Args:
      rules: some of "up", "down", "back", "copy".
      symbols: at least two distinct lower-case letters or digits, in their order.
      partial_credit: for a well-formed wrong response, from 0 to below 1.
      rows: size of the id space of `Prompts.index`.

    Raises:
      ValueError: a knob out of its range, or so few problems that the splits could be empty.
    """
    check_knob("sorting", "longest", longest, 2, 256)
    check_knob("sorting", "shortest", shortest, 1, longest)
    check_knob("sorting", "partial_credit", partial_credit, 0, 0.999)
    if not rules or not set(rules) <= set(RULES):
        raise ValueError(f"sorting: rules must be some of {RULES}, got {rules!r}")
    if len(symbols) < 2 or len(set(symbols)) < len(symbols) or not set(symbols) <= set(LETTERS + "0123456789"):
        raise ValueError(
            f"sorting: symbols must be at least two distinct lower-case letters or digits, got {symbols!r}"
        )
    if len(symbols) ** longest < 64:
        raise ValueError(f"sorting: {len(symbols)} symbols and longest={longest} make too few problems to split")
    return procedural_task(
        name="sorting",
        rows=rows,
        prompt_length=WIDTH + longest + 2,
        response_length=longest + 1,
        words=longest + 2,
        propose=functools.partial(_propose, shortest=shortest, longest=longest, rules=rules, symbols=len(symbols)),
        fingerprint=_fingerprint,
        render=functools.partial(_render, symbols=symbols),
        judge=functools.partial(_judge, symbols=symbols, partial_credit=partial_credit),
        solve=functools.partial(_solve, symbols=symbols),
        grade=functools.partial(grade_string, symbols=symbols, partial_credit=partial_credit),
        columns=functools.partial(_columns, symbols=symbols),
    )


def grade_string(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str],
    symbols: str = LETTERS,
    partial_credit: float = 0.0,
    **_: Any,
) -> list[float | None]:
    """The verifier on text; `answer` is the rewritten string, one per completion."""
    return [
        1.0 if text == right else partial_credit if len(text) == len(right) and set(text) <= set(symbols) else 0.0
        for text, right in zip(completions, answer, strict=True)
    ]


def _propose(noise: Array, *, shortest: int, longest: int, rules: tuple[str, ...], symbols: int) -> dict[str, Array]:
    length = shortest + ch.below(noise[0], longest + 1 - shortest)
    rule = jnp.array([RULES.index(r) for r in rules])[ch.below(noise[1], len(rules))]
    ranks = ch.below(noise[2:], symbols)
    return {"ranks": jnp.where(jnp.arange(longest) < length, ranks, -1), "length": length, "rule": rule}


def _fingerprint(problem: dict[str, Array]) -> Array:
    return ch.fingerprint(jnp.append(problem["ranks"] + 1, problem["rule"]))


def _render(problem: dict[str, Array], *, symbols: str) -> ch.Piece:
    names = jnp.array([ch.encode(rule.ljust(WIDTH)) for rule in RULES])[problem["rule"]]
    rule = (names, jnp.arange(WIDTH) < jnp.array([len(rule) for rule in RULES])[problem["rule"]])
    length = WIDTH + problem["ranks"].shape[0] + 2
    return ch.join([rule, ch.literal(" "), _spell(problem["ranks"], symbols), ch.literal(":")], length)


def _spell(ranks: Array, symbols: str) -> ch.Piece:
    """`[N]` ranks as symbols; -1 is nothing."""
    return jnp.array(ch.encode(symbols))[ranks], ranks >= 0


def _rewrite(problem: dict[str, Array]) -> Array:
    """`[N]` ranks of the answer, -1 after its end."""
    ranks, length = problem["ranks"], problem["length"]
    places = jnp.arange(ranks.shape[0])
    up = jnp.sort(jnp.where(ranks >= 0, ranks, np.iinfo(np.int32).max))
    backwards = jnp.clip(length - 1 - places, 0)
    ordered = jnp.stack([up, up[backwards], ranks[backwards], ranks])[problem["rule"]]
    return jnp.where(places < length, ordered, -1)


def _judge(problem: dict[str, Array], tokens: Array, length: Array, *, symbols: str, partial_credit: float) -> Array:
    expected, _ = _spell(_rewrite(problem), symbols)
    right = ch.equals(tokens, length, expected, problem["length"])
    formed = (length == problem["length"]) & ch.consists_of(tokens, length, jnp.array(ch.encode(symbols)))
    return score(right, formed, partial_credit)


def _solve(noise: Array, problem: dict[str, Array], *, symbols: str) -> tuple[ch.Piece, ch.Piece]:
    """The answer, and the answer with two neighbours swapped, or one symbol replaced if they are equal."""
    ranks, length = _rewrite(problem), problem["length"]
    size = ranks.shape[0]
    first = ch.below(noise, jnp.maximum(length - 1, 1))
    second = jnp.minimum(first + 1, length - 1)
    swapped = ranks.at[first].set(ranks[second]).at[second].set(ranks[first])
    replaced = ranks.at[first].set((ranks[first] + 1) % len(symbols))
    wrong = jnp.where(ranks[first] == ranks[second], replaced, swapped)
    right, slipped = (ch.join([_spell(r, symbols), ch.end()], size + 1) for r in (ranks, wrong))
    return right, slipped


def _columns(prompts: Prompts, *, symbols: str) -> dict[str, list[Any]]:
    target = {key: np.asarray(value) for key, value in prompts.target.items()}
    strings = ["".join(symbols[i] for i in row if i >= 0) for row in target["ranks"]]
    rewritten = [
        {"up": sorted(s, key=symbols.index), "down": sorted(s, key=symbols.index, reverse=True), "back": s[::-1]}.get(
            RULES[rule], s
        )
        for s, rule in zip(strings, target["rule"], strict=True)
    ]
    return {"answer": ["".join(s) for s in rewritten]}
