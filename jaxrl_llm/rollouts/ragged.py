"""Groups of different sizes, and sizes that spend a budget."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Prompts, Rollouts, World


def sample_ragged(world: World, key: Array, prompts: Prompts, sizes: Array, *, largest: int) -> Rollouts:
    """`sizes[b]` responses to prompt `b` in groups of `largest` rows; rows beyond have no token and do not count.

    Args:
      world: samples.
      key: consumed.
      prompts: `[B]`.
      sizes: `[B]` int32, at most `largest`.
      largest: G, known when tracing.
    """
    limit = jnp.where(jnp.arange(largest) < sizes[:, None], world.length, 0)
    return world.sample(key, prompts, largest, limit=limit)


def most_probable(logp: Array, count: Array, sizes: Array, *, budget: int) -> Array:
    """Of all choices with `sum(count * size) == budget` that with the highest sum of `logp`, `[K]` places in `sizes`.

    Found by dynamic programming over what has been spent. There must be such a choice.

    Args:
      logp: `[K A]`, of each of K classes of prompts and A sizes.
      count: `[K]` int32, prompts of each class.
      sizes: `[A]` int32.
      budget: rollouts, all in all.
    """

    def extend(best: Array, one: tuple[Array, Array]) -> tuple[Array, Array]:
        before = jnp.arange(budget + 1) - one[1] * sizes[:, None]
        value = jnp.where(before < 0, -jnp.inf, best[jnp.maximum(before, 0)]) + one[0][:, None]
        return value.max(0), value.argmax(0)

    def back(spent: Array, one: tuple[Array, Array]) -> tuple[Array, Array]:
        choice = one[0][spent]
        return spent - one[1] * sizes[choice], choice

    start = jnp.where(jnp.arange(budget + 1) == 0, 0.0, -jnp.inf)
    _, choices = jax.lax.scan(extend, start, (logp, count))
    found: Array = jax.lax.scan(back, jnp.asarray(budget, count.dtype), (choices, count), reverse=True)[1]
    return found
