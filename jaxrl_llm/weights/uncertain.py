"""Which tokens the policy was unsure of."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch


def uncertain(batch: Batch, *, threshold: float | Array = 0.9) -> Array:
    """`[B G T]` bool: tokens whose probability was below the threshold when they were sampled (2505.23564)."""
    return jnp.exp(batch.rollouts.logp) < threshold
