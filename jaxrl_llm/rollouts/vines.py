"""Several continuations of some states of a response."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.resume import beginnings, resume
from jaxrl_llm.rollouts.rows import join_rows, repeat_rows
from jaxrl_llm.types import PREFIX, Prompts, Rollouts, World, split


def sample_vines(world: World, key: Array, prompts: Prompts, *, vines: int, size: int) -> Rollouts:
    """`[B 1 + vines * size T]`: a response, and `size` continuations of its states at `k / (vines + 1)` of its length.

    What a continuation shares with the response has the role PREFIX. `segment` is 0 at the response's tokens, and `k`
    from 1 on in the rows of vine `k`.

    Raises:
      ValueError: `vines` or `size` is below 1.
    """
    if vines < 1 or size < 1:
        raise ValueError(f"sample_vines: vines and size must be at least 1, got {vines} and {size}")
    keys = split(key, "response", "vines")
    response = world.sample(keys["response"], prompts, 1)
    number = 1 + jnp.arange(vines * size) // size
    place = number * response.attended.sum(-1) // (vines + 1)  # [B vines * size]
    begun = beginnings(repeat_rows(response, vines * size), place)
    ended = resume(world, keys["vines"], begun, shared=size)
    role = jnp.where(begun.attended, PREFIX, ended.role).astype(jnp.int8)
    rows = join_rows(response, dataclasses.replace(ended, role=role, mask=ended.mask & ~begun.attended))
    segment = jnp.append(0, number)[:, None]
    return dataclasses.replace(rows, segment=jnp.broadcast_to(segment, rows.tokens.shape))
