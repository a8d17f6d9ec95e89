"""Credit of many alike agents that act at the same time (OSPO, 2507.15351)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.returns import token_rewards
from jaxrl_llm.stats import centered, standardise
from jaxrl_llm.types import Batch, masked


def spread(x: Array, mask: Array) -> Array:
    """Population standard deviation over the first axis, whose squares do not overflow."""
    deviation = centered(x, mask, axis=0)
    scale = jnp.max(jnp.abs(deviation), axis=0, keepdims=True)
    small = deviation / jnp.where(scale > 0, scale, 1.0)
    return scale[0] * jnp.sqrt(jnp.square(small).sum(0) / jnp.maximum(mask.sum(0), 1))


def one_step(reward: Array, acted: Array, *, fairness: float | Array) -> Array:
    """`(r_i - mean) / (std + 1e-8) - fairness * (std of what all have earned so far, after minus before)`, `[G K]`.

    Each step apart, over the agents that acted in it; nothing of what comes later.

    Args:
      reward: `[G K]` of each agent in each step.
      acted: `[G K]` bool.
      fairness: 0 for none.
    """
    reward = masked(acted, reward)
    everyone = jnp.broadcast_to(acted.any(1, keepdims=True), acted.shape)
    earned = spread(jnp.cumsum(reward, axis=1), everyone)
    change = jnp.diff(earned, prepend=jnp.zeros(1))
    return masked(acted, standardise(reward, acted, ddof=0, eps=1e-8, axis=0) - fairness * change)


def step_advantage(batch: Batch, *, turns: int, fairness: float | Array) -> Array:
    """`one_step` of the rollouts of a prompt, a turn being a step, at the turn's tokens `[B G T]`.

    Args:
      batch: with rewards where they were earned; without `rollouts.turn` a response is one turn.
      turns: K; tokens of later turns have no advantage.
      fairness: see `one_step`.
    """
    turn = jnp.zeros(batch.mask.shape, jnp.int32) if batch.rollouts.turn is None else batch.rollouts.turn
    member = (turn[..., None] == jnp.arange(turns)) & batch.mask[..., None]  # [B G T K]
    reward = masked(member, token_rewards(batch)[..., None]).sum(-2)
    credit = jax.vmap(partial(one_step, fairness=fairness))(reward, member.any(-2))
    return masked(member, credit[:, :, None]).sum(-1)
