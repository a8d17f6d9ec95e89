"""Rows of a group in another order, some more than once, some not at all."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Context, PyTree, Rollouts


def along_group(tree: PyTree, rows: Array) -> PyTree:
    """Arrays `[B G ...]` at `rows [B n]`: `[B n ...]`. `None` stays `None`."""

    def taken(x: Array) -> Array:
        return jnp.take_along_axis(x, rows.reshape(*rows.shape, *[1] * (x.ndim - 2)), axis=1)

    return jax.tree.map(taken, tree)


def take_rows(rollouts: Rollouts, rows: Array) -> Rollouts:
    """The rows `rows [B n]` of each group; what belongs to the prompt stays."""
    size = rollouts.tokens.shape[1]
    of_row: dict[str, Any] = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)}
    of_prompt = {name: of_row.pop(name) for name in ("prompts", "generated")}
    contexts: dict[str, Any] = {name: _of_rows(of_row.pop(name), rows, size) for name in ("context", "teacher")}
    return Rollouts(**of_prompt, **contexts, **along_group(of_row, rows))


def repeat_rows(rollouts: Rollouts, times: int) -> Rollouts:
    """Each row `times` times, `[B G * times T]`; its copies are consecutive."""
    b, g = rollouts.tokens.shape[:2]
    return take_rows(rollouts, jnp.broadcast_to(jnp.arange(g * times) // times, (b, g * times)))


def join_rows(first: Rollouts, second: Rollouts) -> Rollouts:
    """The rows of both, `[B G1 + G2 T]`, of the same prompts in one context a prompt; no teacher, nothing generated."""
    of_row: dict[str, Any] = {}
    for field in dataclasses.fields(Rollouts):
        if field.name not in ("prompts", "generated", "context", "teacher"):
            pair = getattr(first, field.name), getattr(second, field.name)
            of_row[field.name] = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), *pair)
    return Rollouts(prompts=first.prompts, context=first.context, **of_row)


def _of_rows(context: Context | None, rows: Array, size: int) -> Context | None:
    """One context for all rows stays one; fewer than rows are repeated first, as consecutive rows share them."""
    if context is None or context.tokens.shape[1] == 1:
        return context
    each = size // context.tokens.shape[1]
    own: Context = along_group(jax.tree.map(lambda x: jnp.repeat(x, each, axis=1), context), rows)
    return own
