"""Groups of own samples and of responses that came with the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.logged import logged
from jaxrl_llm.types import PADDING, Prompts, Rollouts, Sampling, World

Which = Callable[[World, Prompts], Array]


def with_logged(world: World, key: Array, prompts: Prompts, *, size: int, take: int = 1) -> Rollouts:
    """`size` samples of each prompt, then its `take` best logged responses (role INJECTED), `[B size+take T]`.

    The verifier judges all rows, whoever wrote them. Logged rows are scored under the unfiltered distribution at
    temperature 1.

    Raises:
      ValueError: the prompts carry no responses, or fewer than `take`.
    """
    own = world.sample(key, prompts, size)
    return side_by_side(own, logged(world, key, prompts, take=take))


def logged_or_sampled(world: World, key: Array, prompts: Prompts, *, size: int, which: Which) -> Rollouts:
    """`with_logged`, where a prompt has either samples or its best logged response: the other rows have no tokens.

    Prompts that are not sampled cost nothing in the sampler's loop.

    Args:
      world: samples.
      key: consumed.
      prompts: with logged responses.
      size: samples of a prompt that is sampled.
      which: `(world, prompts) -> [B]` bool: prompts that give their logged response.
    """
    chosen = which(world, prompts)[:, None]
    limit = jnp.where(chosen, 0, jnp.full((1, size), world.length))
    own = world.sample(key, prompts, size, limit=limit)
    return side_by_side(own, _only(chosen, logged(world, key, prompts, take=1)))


def carries_logged(world: World, prompts: Prompts) -> Array:
    """`[B]` bool: prompts that came with a response.

    Raises:
      ValueError: none of this data did.
    """
    if prompts.logged is None:
        raise ValueError("carries_logged needs prompts.logged: this data has no responses")
    return prompts.logged.mask.any((-2, -1))


def before_step(world: World, prompts: Prompts, *, step: int) -> Array:
    """`[B]` bool: every prompt in the first `step` steps, none later."""
    return jnp.broadcast_to(world.step < step, prompts.index.shape)


def side_by_side(own: Rollouts, data: Rollouts) -> Rollouts:
    """The rows of `own`, then those of `data`, which answer the same prompts; padded to the longer of the two."""
    length = max(own.tokens.shape[-1], data.tokens.shape[-1])
    first, second = _padded(own, length), _padded(data, length)
    names = ("tokens", "mask", "role", "logp", "entropy", "version", "truncated")
    fields: dict[str, Any] = {
        name: jnp.concatenate([getattr(first, name), getattr(second, name)], axis=1) for name in names
    }
    # `None` leaves a filter out; where there is one it is switched off for rows nobody sampled.
    off: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    off = {name: None if getattr(own.sampling, name) is None else x for name, x in off.items()}
    rows = data.mask.shape[:2]
    sampling = jax.tree.map(
        lambda x, y: jnp.concatenate([x, jnp.full(rows, y, jnp.asarray(x).dtype)], axis=1),
        own.sampling,
        Sampling(**off),
    )
    return dataclasses.replace(own, **fields, sampling=sampling, outcome=None)


def _padded(rollouts: Rollouts, length: int) -> Rollouts:
    gap = length - rollouts.tokens.shape[-1]
    names = ("tokens", "mask", "role", "logp", "entropy", "version")  # PADDING is 0
    wide: dict[str, Any] = {name: jnp.pad(getattr(rollouts, name), [(0, 0), (0, 0), (0, gap)]) for name in names}
    return dataclasses.replace(rollouts, **wide)


def _only(chosen: Array, rollouts: Rollouts) -> Rollouts:
    """The rows where `chosen` `[B 1]`, the others without a token."""
    there = chosen[..., None]
    role = jnp.where(there, rollouts.role, PADDING).astype(rollouts.role.dtype)
    return dataclasses.replace(rollouts, mask=rollouts.mask & there, role=role)
