"""Pairs out of groups."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch


def best_and_worst(batch: Batch) -> Array:
    """`[B G]` bool: one row with the highest and one with the lowest reward of each group, the first of equals.

    A group whose rewards are all equal has no pair and is dropped whole.
    """
    reward, rows = batch.outcome if batch.reward is None else batch.reward, batch.rows
    best = jnp.argmax(jnp.where(rows, reward, -jnp.inf), -1, keepdims=True)
    worst = jnp.argmin(jnp.where(rows, reward, jnp.inf), -1, keepdims=True)
    differ = jnp.take_along_axis(reward, best, -1) > jnp.take_along_axis(reward, worst, -1)
    row = jnp.arange(reward.shape[-1])
    return ((row == best) | (row == worst)) & differ & (rows.sum(-1, keepdims=True) > 1)
