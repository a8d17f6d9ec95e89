"""A critic that says how often the policy succeeds from a state; its value is a logit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Scores, masked


def correct(batch: Batch) -> Array:
    """`[B G]`: 1 where the outcome is above 0.5, else 0."""
    return (batch.outcome > 0.5).astype(jnp.float32)


def cross_entropy(logit: Array, target: Array) -> Array:
    """`-target log p - (1 - target) log(1 - p)`, with `p = sigmoid(logit)`."""
    return target * jax.nn.softplus(-logit) + (1 - target) * jax.nn.softplus(logit)


def success_rate_loss(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`weight` times the critic's `cross_entropy` to the share of correct rows of the group, `[B G T]`.

    Raises:
      ValueError: there is no critic.
    """
    if scores.value is None:
        raise ValueError("success_rate_loss needs scores.value: train with a critic")
    target = masked_mean(correct(batch), batch.rows, axis=-1)[:, None, None]
    return weight * masked(batch.mask, cross_entropy(masked(batch.mask, scores.value), target))
