"""What a state is worth: the mean outcome of fresh completions from it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.resume import beginnings, resume
from jaxrl_llm.rollouts.rows import repeat_rows
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Rollouts, World, masked

Carry = tuple[Array, Array, Array]  # states done, their values, tokens sampled


def values_at(
    world: World, key: Array, rollouts: Rollouts, states: Array, *, completions: int, most: int
) -> tuple[Array, Array]:
    """The values of the states before chosen tokens, state after state in one loop that ends with the last row's.

    Args:
      world: samples and verifies.
      key: consumed.
      rollouts: `[B G T]`, all rows of a prompt in one context.
      states: `[B G T]` bool: tokens before which a state is valued.
      completions: samples from each state.
      most: K, at least the number of states of any row.

    Returns:
      `[B G K]`, 0 beyond a row's last state and NaN if no completion could be scored; and `[B]` tokens sampled.
    """
    rank, count = jnp.cumsum(states, -1), states.sum(-1)

    def value(carry: Carry) -> Carry:
        k, values, sampled = carry
        there = k < count
        place = jnp.argmax(states & (rank == k + 1), -1)
        begun = repeat_rows(beginnings(rollouts, jnp.where(there, place, 0), going=there), completions)
        ended = resume(world, jax.random.fold_in(key, k), begun, shared=completions)
        outcome = world.reward(ended).reshape(*there.shape, completions)
        known = ~jnp.isnan(outcome)
        mean = jnp.where(known.any(-1), masked_mean(outcome, known, axis=-1), jnp.nan)
        new = (ended.attended.sum(-1) - begun.attended.sum(-1)).sum(-1)
        return k + 1, values.at[..., k].set(masked(there, mean)), sampled + new

    start = (jnp.int32(0), jnp.zeros((*count.shape, most)), jnp.zeros(count.shape[0], jnp.int32))
    _, values, sampled = jax.lax.while_loop(lambda carry: (carry[0] < count).any(), value, start)
    return values, sampled.astype(jnp.float32)
