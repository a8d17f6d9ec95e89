"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, masked


def weighted_sum(
    batch: Batch, *, rewards: tuple[Callable[[Batch], Array], ...], weights: tuple[float | Array, ...]
) -> Array:
    """`sum_k w_k r_k`, `[B G]` (2503.21819); 0 on rows that do not count.

    Args:
      batch: given to each reward.
      rewards: each `(Batch) -> [B G]`.
      weights: one number each.

    Raises:
      ValueError: not one weight a reward, or a reward of another shape.
    """
    if len(rewards) != len(weights) or not rewards:
        raise ValueError(f"weighted_sum needs a weight for each reward, got {len(rewards)} and {len(weights)}")
    total = jnp.zeros(batch.outcome.shape)
    for reward, weight in zip(rewards, weights, strict=True):
        value = reward(batch)
        if value.shape != total.shape:
            raise ValueError(f"weighted_sum adds rewards of rows, {total.shape}; one has the shape {value.shape}")
        total = total + weight * masked(batch.rows, value)
    return total


def finished(batch: Batch) -> Array:
    """`[B G]`: 1 for a response that ended by itself, 0 for one that was cut."""
    return 1.0 - batch.rollouts.truncated
