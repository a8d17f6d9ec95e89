"""Responses that take more than one step: started, interrupted, continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.prompts.context import extend
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


def resume(
    world: World,
    key: Array,
    partial: Rollouts,
    *,
    window: int | None = None,
    until: Callable[[Array], Array] | None = None,
) -> Rollouts:
    """Continues the unfinished rows where they are, with the current policy; a row may hold tokens of several versions.

    Args:
      world: samples.
      key: consumed.
      partial: `[B G T]`; every row's tokens are what it has so far. All rows of a prompt share its context.
      window: at most how many new tokens a row gets.
      until: see `World.sample`.

    Returns:
      the same rows, longer; log-probs, entropies and versions of tokens that were there are kept.
    """
    size, length = partial.tokens.shape[1:]
    had = partial.attended.sum(-1)
    limit = jnp.where(partial.truncated, length - had, 0)
    limit = limit if window is None else jnp.minimum(limit, window)
    context = extend(partial.context, (partial.tokens, partial.attended))
    new = world.sample(
        key, partial.prompts, size, context=context, sampling=partial.sampling, length=length, limit=limit, until=until
    )
    place = jnp.arange(length) - had[..., None]

    def spliced(old: Array, added: Array) -> Array:
        return jnp.where(place < 0, old, jnp.take_along_axis(added, jnp.maximum(place, 0), axis=-1))

    names = ("tokens", "mask", "role", "logp", "entropy", "version")
    fields: dict[str, Any] = {name: spliced(getattr(partial, name), getattr(new, name)) for name in names}
    return dataclasses.replace(partial, **fields, truncated=jnp.where(limit > 0, new.truncated, partial.truncated))
