"""Reward-to-go."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import discounted_sum
from jaxrl_llm.types import Batch, masked


def rewards_to_go(reward: Array, mask: Array, *, gamma: float = 1.0) -> Array:
    """`G_t = r_t + gamma * G_{t+1}` of one sequence, `[T]`; tokens that do not count are stepped over undiscounted."""
    return masked(mask, discounted_sum(masked(mask, reward), jnp.where(mask, gamma, 1.0)))


def reward_to_go(batch: Batch, *, gamma: float = 1.0) -> Array:
    """The discounted sum of the rewards from each token on, `[B G T]` (REINFORCE; REINFORCE++, 2501.03262)."""
    fn = functools.partial(rewards_to_go, gamma=gamma)
    return jax.vmap(jax.vmap(fn))(token_rewards(batch), batch.mask)


def token_rewards(batch: Batch) -> Array:
    """`[B G T]`: `batch.token_reward`.

    Raises:
      ValueError: the reward slot has not run.
    """
    if batch.token_reward is None:
        raise ValueError("a per-token return needs batch.token_reward, which the reward slot writes")
    return batch.token_reward
