"""Credit without statistics, and how a row's credit reaches its tokens."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, masked


def row_reward(batch: Batch) -> Array:
    """`[B G]`: the reward slot's; the verifier's outcome if that slot has not run."""
    return batch.outcome if batch.reward is None else batch.reward


def over_tokens(batch: Batch, credit: Array) -> Array:
    """`[B G] -> [B G T]`: a row's credit at each of its tokens that count, 0 elsewhere."""
    return masked(batch.mask, jnp.broadcast_to(credit[..., None], batch.mask.shape))


def raw(batch: Batch) -> Array:
    """`A = R`, `[B G T]`: no baseline (REINFORCE with b = 0)."""
    return over_tokens(batch, row_reward(batch))


def uniform(batch: Batch) -> Array:
    """`A = 1`, `[B G T]`: every token that counts is to become more likely (supervised fine-tuning)."""
    return batch.mask.astype(jnp.float32)
