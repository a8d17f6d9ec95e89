"""The verifier's outcome as the reward."""

from jax import Array

from jaxrl_llm.types import Batch


def verified(batch: Batch) -> Array:
    """`[B G]`: the verifier's outcome, unchanged."""
    return batch.outcome
