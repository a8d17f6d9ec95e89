"""P3O: pairwise proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.rloo import rloo
from jaxrl_llm.losses.group import GroupLoss, mean_over_pairs, sequence_log_ratio
from jaxrl_llm.updates.passes import several_passes


def separate_clip(first: Array, second: Array, reward: Array, other: Array, *, clip: float | Array) -> Array:
    """Each row's ratio is clipped on its own, weighted by the other's (V1). `first` and `second` are log-ratios."""
    ratio, beside, advantage = jnp.exp(first), jnp.exp(second), reward - other
    return (_clipped(ratio, advantage * beside, clip) + _clipped(beside, -advantage * ratio, clip)) / 2


def joint_clip(first: Array, second: Array, reward: Array, other: Array, *, clip: float | Array) -> Array:
    """The log of the quotient of both ratios is clipped (V2). `first` and `second` are log-ratios."""
    quotient, scale = first - second, jax.lax.stop_gradient((reward - other) * jnp.exp(first + second))
    return jnp.maximum(-scale * quotient, -scale * jnp.clip(quotient, -clip, clip)) / 2


def _clipped(ratio: Array, scale: Array, clip: float | Array) -> Array:
    scale = jax.lax.stop_gradient(scale)
    return jnp.maximum(-scale * ratio, -scale * jnp.clip(ratio, 1 - clip, 1 + clip))


def p3o(
    *,
    group_size: int = 2,
    clip: float = 0.2,
    kl: float | None = 0.05,
    pair: Callable[..., Array] = joint_clip,
    minibatches: int = 1,
) -> Algorithm:
    """PPO on differences of rewards: of two answers, one becomes more likely at the other's expense.

    What every answer to a prompt gains alike cancels. Whole responses are the actions; their divergence from the
    reference is part of the reward.

    Source: "Pairwise Proximal Policy Optimization", 2310.00212.
    Deviations: the gradient and the algorithm are the paper's; how V1 and V2 clip is the usual pessimistic form, as
      their exact form was not at hand. Larger groups use the mean over all pairs.
    Limit: at the old policy, with groups of two, the gradient of either is that of `rloo` with the same kl.
    Family: preference.

    Args:
      group_size: 2 in the paper.
      clip: half the width of the clip.  # not in the paper; that of PPO
      kl: weight of `log(pi_old / pi_ref)` in the reward, swept in the paper; None or 0 drops the
        reference.  # 0.05: not in the paper
      pair: `joint_clip` (V2, the more stable) or `separate_clip` (V1, the higher reward).
      minibatches: optimiser steps a batch; the clip acts from the second on.  # not in the paper

    Raises:
      ValueError: a group without a pair.
    """
    if group_size < 2:
        raise ValueError(f"p3o compares answers to one prompt: group_size must be at least 2, got {group_size}")
    return replace(
        rloo(group_size=group_size, kl=kl),
        loss=GroupLoss(objective=partial(mean_over_pairs, partial(pair, clip=clip)), score=sequence_log_ratio),
        update=partial(several_passes, minibatches=minibatches),
    )
