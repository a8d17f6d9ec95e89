"""Responses that take more than one step: started, interrupted, continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.contexts import extend
from jaxrl_llm.types import PADDING, Problem, Prompts, Rollouts, Sampling, World


def unstarted(prompts: Prompts, sampling: Sampling, *, size: int, length: int) -> Rollouts:
    """Groups `[B size length]` without a token, to be continued."""
    rows = (prompts.index.shape[0], size)
    shape = (*rows, length)
    return Rollouts(
        prompts=dataclasses.replace(prompts, logged=None),
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=jnp.zeros(shape, jnp.int32),
        mask=jnp.zeros(shape, bool),
        role=jnp.full(shape, PADDING, jnp.int8),
        logp=jnp.zeros(shape),
        entropy=jnp.zeros(shape),
        version=jnp.zeros(shape, jnp.int32),
        truncated=jnp.ones(rows, bool),
        sampling=jax.tree.map(lambda x: jnp.broadcast_to(x, rows), sampling),
    )


def buffer(problem: Problem, *, groups: int, size: int) -> Rollouts:
    """Room for `groups` unfinished groups between steps: what a rollout stage's `init` allocates."""
    blank = jax.tree.map(lambda x: jnp.zeros((groups, *x.shape[1:]), x.dtype), problem.example)
    return unstarted(blank, problem.sampling, size=size, length=problem.length)


def unfinished(rollouts: Rollouts) -> Array:
    """`[B G]` bool: rows that ended neither at EOS nor at the budget."""
    return rollouts.truncated & (rollouts.attended.sum(-1) < rollouts.tokens.shape[-1])


def beginnings(rollouts: Rollouts, length: Array, *, going: Array | bool = True) -> Rollouts:
    """The first `length` (`[B G]`) tokens of each row, to be continued where `going` (`[B G]` bool)."""
    exists = rollouts.attended & (jnp.arange(rollouts.tokens.shape[-1]) < length[..., None])
    names = ("tokens", "mask", "logp", "entropy", "version")
    fields: dict[str, Any] = {
        name: jnp.where(exists, x := getattr(rollouts, name), jnp.zeros_like(x)) for name in names
    }
    role = jnp.where(exists, rollouts.role, PADDING).astype(jnp.int8)
    return dataclasses.replace(rollouts, **fields, role=role, truncated=jnp.broadcast_to(going, length.shape))


def resume(
    world: World,
    key: Array,
    partial: Rollouts,
    *,
    window: int | None = None,
    until: Callable[[Array], Array] | None = None,
    shared: int = 1,
    longest: int | None = None,
) -> Rollouts:
    """Continues the unfinished rows where they are, with the current policy; a row may hold tokens of several versions.

    Args:
      world: samples.
      key: consumed.
      partial: `[B G T]`; every row's tokens are what it has so far. All rows of a prompt share its context.
      window: at most how many new tokens a row gets.
      until: see `World.sample`.
      shared: how many consecutive rows have the same tokens so far, so that these are encoded once.
      longest: the most tokens a row has so far, if that is known to be less than `T`.

    Returns:
      the same rows, longer; log-probs, entropies and versions of tokens that were there are kept.
    """
    size, length = partial.tokens.shape[1:]
    had = partial.attended.sum(-1, dtype=jnp.int32)
    limit = jnp.where(unfinished(partial), length - had, 0)
    rooms = length if window is None else min(window, length)
    begun = (slice(None), slice(None, None, shared), slice(longest))
    context = extend(partial.context, (partial.tokens[begun], partial.attended[begun]))
    new = world.sample(
        key,
        partial.prompts,
        size,
        context=context,
        sampling=partial.sampling,
        length=rooms,
        limit=jnp.minimum(limit, rooms),
        until=until,
        own=had[:, ::shared],
    )
    place = jnp.arange(length) - had[..., None]

    def moved(x: Array) -> Array:
        return jnp.take_along_axis(x, jnp.clip(place, 0, rooms - 1), axis=-1)

    added = (place >= 0) & (place < rooms) & moved(new.attended)
    names = ("tokens", "mask", "role", "logp", "entropy", "version")
    fields: dict[str, Any] = {
        name: jnp.where(added, moved(getattr(new, name)), getattr(partial, name)) for name in names
    }
    return dataclasses.replace(partial, **fields, truncated=jnp.where(limit > 0, new.truncated, partial.truncated))
