"""Rewards for length, always in tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rewards.basic import at_last_token, token_rewards_so_far
from jaxrl_llm.types import POLICY, Batch


def overlong(batch: Batch, *, limit: int | None = None, cache: int | None = None) -> Array:
    """Adds DAPO's soft overlong punishment at the last token, `[B G T]` (2503.14476, eq. 13).

    0 up to `limit - cache` tokens, then falling linearly to -1 at `limit`, -1 beyond.

    Args:
      batch: its lengths are counted in tokens the policy wrote, EOS included.
      limit: tokens; the padded length `T`, which is the generation budget, if None.
      cache: tokens; a fifth of the limit if None (4096 of 20480 in the paper).

    Raises:
      ValueError: `cache` is not in 1 ... `limit`.
    """
    limit = batch.rollouts.mask.shape[-1] if limit is None else limit
    cache = max(limit // 5, 1) if cache is None else cache
    if not 0 < cache <= limit:
        raise ValueError(f"overlong: cache must be 1 to limit ({limit}) tokens, got {cache}")
    lengths = (batch.rollouts.mask & (batch.rollouts.role == POLICY)).sum(-1)
    return token_rewards_so_far(batch) + at_last_token(batch.rollouts.mask, punishment(lengths, limit, cache))


def punishment(lengths: Array, limit: int, cache: int) -> Array:
    """`clip((limit - cache - L) / cache, -1, 0)`, the shape of `lengths`."""
    return jnp.clip((limit - cache - lengths) / cache, -1.0, 0.0)
