"""Demonstrations by how often the policy solves their prompt.

In groups that hold the policy's own rows and injected ones. A row is correct if its outcome is above the threshold.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch


def solved(batch: Batch, *, threshold: float | Array = 0.5) -> tuple[Array, Array]:
    """How many of the policy's own rows that count are correct, and how many count: `[B]` each."""
    own = batch.rows & ~batch.rollouts.injected
    return (own & (batch.outcome > threshold)).sum(-1), own.sum(-1)


def own_or_injected(batch: Batch, *, gate: float | Array, threshold: float | Array = 0.5) -> Array:
    """`[B G]` bool: own rows of prompts whose pass rate is above `gate`, injected rows of the others (2509.04419)."""
    correct, rows = solved(batch, threshold=threshold)
    explore = correct / jnp.maximum(rows, 1) > gate
    return explore[:, None] ^ batch.rollouts.injected


def injected_if_rare(batch: Batch, *, fewer_than: float | Array, threshold: float | Array = 0.5) -> Array:
    """`[B G T]`: 1, and 0 on injected rows of prompts with at least `fewer_than` correct rows (2510.08540)."""
    correct, _ = solved(batch, threshold=threshold)
    off = batch.rollouts.injected & (correct >= fewer_than)[:, None]
    return jnp.broadcast_to(jnp.where(off, 0.0, 1.0)[..., None], batch.rollouts.tokens.shape)
