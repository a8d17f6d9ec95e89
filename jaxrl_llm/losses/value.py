"""The critic's loss as a term."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Scores, masked


def value_loss(
    scores: Scores,
    batch: Batch,
    *,
    returns: Callable[[Batch], Array],
    weight: float | Array = 1.0,
    clip: float | Array = 0.2,
) -> Array:
    """`weight / 2 * max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2)`, `[B G T]`.

    PPO's value loss with the pessimistic clipping of OpenAI's implementation (1707.06347; 2005.12729, section 3).

    Args:
      scores: with the critic's current values.
      batch: with its values before the update.
      returns: `(batch) -> [B G T]`: what the critic should say.
      weight: c_1.
      clip: how far a value may move from what it was; infinity is no clipping.

    Raises:
      ValueError: there is no critic.
    """
    if scores.value is None or batch.value is None:
        raise ValueError("value_loss needs scores.value and batch.value: train with a critic")
    new, old = masked(batch.mask, scores.value), jax.lax.stop_gradient(masked(batch.mask, batch.value))
    target = jax.lax.stop_gradient(masked(batch.mask, returns(batch)))
    near = jnp.clip(new, old - clip, old + clip)
    return weight / 2 * jnp.maximum(jnp.square(new - target), jnp.square(near - target))
