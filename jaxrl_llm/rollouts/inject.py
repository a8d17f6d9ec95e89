"""Responses sampled under one context and learnt under another: rows that take the place of others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import INJECTED, PADDING, Rollouts

_OF_ROW = ("tokens", "mask", "role", "logp", "entropy", "version", "truncated", "outcome")


def injected(rollouts: Rollouts) -> Rollouts:
    """The rows as text that the scored context did not produce: role INJECTED, without behaviour log-probs."""
    role = jnp.where(rollouts.attended, INJECTED, PADDING).astype(jnp.int8)
    zero = jnp.zeros_like(rollouts.logp)
    return dataclasses.replace(rollouts, role=role, logp=zero, entropy=zero)


def best_row(rollouts: Rollouts) -> Array:
    """`[B]`: the row with the highest outcome, the first of equals; rows without token or score come last.

    Raises:
      ValueError: the outcome is not known.
    """
    if rollouts.outcome is None:
        raise ValueError("best_row needs rollouts.outcome: ask world.reward first")
    known = rollouts.mask.any(-1) & ~jnp.isnan(rollouts.outcome)
    return jnp.argmax(jnp.where(known, rollouts.outcome, -jnp.inf), axis=-1)


def with_row(
    rollouts: Rollouts, others: Rollouts, row: Array, *, place: int = 0, where: Array | None = None
) -> Rollouts:
    """`rollouts` whose row `place` is row `row` (`[B]`) of `others`, in its own context; both know their outcomes.

    Args:
      rollouts: `[B G T]`.
      others: `[B G' T]`.
      row: of `others`.
      place: in `rollouts`.
      where: `[B]` bool, groups where this happens; all if None.
    """

    def swapped(old: Array, new: Array) -> Array:
        index = row.reshape(-1, *[1] * (new.ndim - 1))
        one = jnp.take_along_axis(new, index, axis=1)[:, 0]
        if where is not None:
            one = jnp.where(where.reshape(-1, *[1] * (one.ndim - 1)), one, old[:, place])
        return old.at[:, place].set(one)

    fields: dict[str, Any] = {name: swapped(getattr(rollouts, name), getattr(others, name)) for name in _OF_ROW}
    return dataclasses.replace(rollouts, **fields)
