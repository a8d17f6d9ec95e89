"""The covariance of log-probs and advantages, token by token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import centered
from jaxrl_llm.types import Batch, Scores


def covariance(scores: Scores, batch: Batch) -> Array:
    """`(A - mean(A)) * (l - mean(l))`, `[B G T]`, means over the step's tokens (2505.22617); carries no gradient.

    Raises:
      ValueError: log-probs or advantages are missing.
    """
    if scores.logp is None or batch.advantage is None:
        raise ValueError("covariance needs scores.logp and batch.advantage")
    logp = jax.lax.stop_gradient(scores.logp)
    return centered(batch.advantage, batch.mask) * centered(logp, batch.mask)


def at_least_one(share: float | Array, mask: Array) -> Array:
    """`max(1, int(share * N))`, `[]`, `N` the places in `mask`."""
    return jnp.maximum(1, jnp.floor(share * mask.sum())).astype(jnp.int32)
