"""Groups of independent samples."""

from __future__ import annotations

from jax import Array

from jaxrl_llm.types import Prompts, Rollouts, World


def sample_group(world: World, key: Array, prompts: Prompts, *, size: int) -> Rollouts:
    """`size` independent responses to each prompt from the current policy.

    Raises:
      ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"sample_group: size must be at least 1, got {size}")
    return world.sample(key, prompts, size)
