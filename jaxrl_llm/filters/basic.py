"""Which rollouts count."""

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch


def everything(batch: Batch) -> Array:
    """`[B G]` bool: every row."""
    return jnp.ones(batch.outcome.shape, bool)
