"""Groups some of whose rows are drawn at another temperature than the one they are learnt under."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Prompts, Rollouts, World, split


def sample_tempered(
    world: World,
    key: Array,
    prompts: Prompts,
    *,
    size: int,
    temperature: float | Array,
    chance: float | Array = 1.0,
    horizon: float | Array = jnp.inf,
    limit: Array | None = None,
) -> Rollouts:
    """`size` responses a prompt, each with probability `chance` drawn at `temperature` instead of the run's.

    The rows stay defined under the run's sampling distribution: log-probs are recomputed under it, while
    `rollouts.logp` is that of the distribution a row was drawn from.

    Args:
      world: samples.
      key: split.
      prompts: `[B]`.
      size: G.
      temperature: at step 0.
      chance: of each row.
      horizon: steps over which the temperature goes linearly to 1; it stays if infinite.
      limit: see `World.sample`.

    Raises:
      ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"sample_tempered: size must be at least 1, got {size}")
    keys, rows = split(key, "which", "sample"), (prompts.index.shape[0], size)
    left = jnp.clip(1 - world.step / horizon, 0.0, 1.0)
    hot = jax.random.bernoulli(keys["which"], chance, rows)
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, rows), world.sampling)
    now = jnp.where(hot, 1 + left * (temperature - 1), own.temperature)
    drawn = world.sample(keys["sample"], prompts, size, sampling=dataclasses.replace(own, temperature=now), limit=limit)
    return dataclasses.replace(drawn, sampling=own)
