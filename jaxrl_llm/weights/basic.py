"""No weight."""

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch


def ones(batch: Batch) -> Array:
    """`[B G T]`: 1 everywhere."""
    return jnp.ones(batch.rollouts.tokens.shape)
