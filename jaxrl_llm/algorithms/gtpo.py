"""GTPO: group-relative trajectory-based policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.advantages.group import center
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Scores, masked


def shared_run(tokens: Array, mask: Array, sign: Array) -> Array:
    """`[G T]` bool: the positions from the start on that, without a gap, some row of the other sign has the same id at.

    Args:
      tokens: `[G T]`.
      mask: `[G T]` bool.
      sign: `[G]` in -1, 0, 1; rows of sign 0 take no part.
    """
    same = (tokens[:, None] == tokens) & mask[:, None] & mask  # [G G T]
    conflict = (same & (sign[:, None] * sign < 0)[..., None]).any(1)
    return jnp.cumprod(conflict, axis=-1).astype(bool)


def conflict_weights(tokens: Array, mask: Array, advantage: Array, *, reward: float | Array = 2.0) -> Array:
    """`[G T]`: of tokens that begin or end answers of both signs alike, `reward` where A > 0 and 0 where A < 0; else 1.

    A token in a shared beginning and in a shared end has the product of both.
    """
    sign = jnp.sign(advantage)
    forward = shared_run(tokens, mask, sign)
    # Backwards, every row begins at its last token.
    length = jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[-1] + 1), 0), axis=-1, keepdims=True)
    turned = (length - 1 - jnp.arange(mask.shape[-1])) % mask.shape[-1]
    turn = partial(jnp.take_along_axis, indices=turned, axis=-1)
    backward = turn(shared_run(turn(tokens), turn(mask), sign))
    factor = jnp.where(sign > 0, reward, 0.0)[:, None]
    return jnp.where(forward, factor, 1.0) * jnp.where(backward, factor, 1.0)


def shaped(advantage: Array, entropy: Array, *, weight: float | Array, limit: float | Array) -> Array:
    """`A - weight * H`, or 0 for rows whose mean token entropy exceeds `limit`; `[G]`."""
    return masked(entropy <= limit, advantage - weight * entropy)


def trajectory(batch: Batch, *, reward: float | Array, weight: float | Array, limit: float | Array) -> Array:
    """`[B G T]`: centred rewards, shaped by entropy, times the conflict weights of their sign before shaping."""
    entropy = masked_mean(masked(batch.mask, batch.rollouts.entropy), batch.mask, axis=-1)
    advantage = jax.vmap(center)(row_reward(batch), batch.rows)
    tokens = jax.vmap(partial(conflict_weights, reward=reward))(batch.rollouts.tokens, batch.mask, advantage)
    return tokens * masked(batch.rows, shaped(advantage, entropy, weight=weight, limit=limit))[..., None]


def own_ratio(scores: Scores, batch: Batch) -> Array:
    """`exp(l - sg[l])`: 1, with the gradient of the log-prob."""
    assert scores.logp is not None
    logp = masked(batch.mask, scores.logp)
    return jnp.exp(logp - jax.lax.stop_gradient(logp))


def gtpo(*, group_size: int = 8, reward: float = 2.0, entropy: float = 0.1, limit: float = 0.7) -> Algorithm:
    """Centred rewards that spare what right and wrong answers share, without answers of high entropy.

    A beginning or end that answers of both signs have in common, mostly format, is rewarded in the right ones and not
    punished in the wrong ones. No divergence, no clip.

    Source: "GTPO: Group-relative Trajectory-based Policy Optimization", 2508.03772, and its released code.
    Deviations: a row is not divided by its number of conflict tokens (the released code does, the paper does not); the
      entropy is the sampler's. Groups of equal rewards are pushed down a little, as in the paper.
    Limit: with reward=1, entropy=0, an infinite limit and no tokens shared by answers of both signs, the gradient of
      REINFORCE with centred rewards, a mean over rows of means over tokens.
    Family: credit.

    Args:
      group_size: 8 to 12 in the paper.
      reward: weight of a shared token in an answer above the mean.
      entropy: weight of a row's mean token entropy.
      limit: rows above it do not count; log 2 in the paper's formula, 0.7 in its code. Infinite if the policy starts
        above log 2.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=partial(trajectory, reward=reward, weight=entropy, limit=limit),
        loss=PolicyLoss(ratio=own_ratio, surrogate=unclipped, aggregate=sequence_mean_token_mean),
    )
