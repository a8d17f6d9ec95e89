"""Contrastive policy gradient."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import raw
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.losses.group import GroupLoss, mean_over_pairs
from jaxrl_llm.losses.preference import implicit_reward
from jaxrl_llm.rollouts.group import sample_group


def contrast(first: Array, second: Array, reward: Array, other: Array, *, kl: float | Array) -> Array:
    """`-(R_1 - R_2) d + kl / 2 * d^2`, `d = s_1 - s_2`: least where `kl * d = R_1 - R_2`."""
    difference = first - second
    return -(reward - other) * difference + kl / 2 * jnp.square(difference)


def contrasts(score: Array, reward: Array, rows: Array, *, kl: float | Array) -> Array:
    """The sum over the pairs of one group, divided by `G - 1`: the scale of leave-one-out. Arguments `[G]`."""
    return rows.sum() / 2 * mean_over_pairs(partial(contrast, kl=kl), score, reward, rows)


def copg(*, group_size: int = 4, kl: float = 0.1) -> Algorithm:
    """Regresses reward differences by differences of log-ratios: a policy gradient that holds off-policy.

    Each response is the other's baseline, so that no importance weights are needed: the minimiser is the optimum of the
    reward with a divergence, whatever wrote the responses. With `rollout=logged` it learns from data alone.

    Source: "Contrastive Policy Gradient", 2406.19185: the pair loss with several samples, on log-ratios summed over
      the response.
    Deviations: the weight of the divergence is swept there.
    Limit: on samples of the policy its gradient is `group_size` times that of `rloo` with the same kl: a mean over
      prompts of a sum over rows.
    Family: preference.

    Args:
      group_size: responses a prompt.  # not in the paper
      kl: weight of the divergence; unlike elsewhere it cannot be 0 if there is to be an optimum.  # not in the paper

    Raises:
      ValueError: a group without a pair.
    """
    if group_size < 2:
        raise ValueError(f"copg compares answers to one prompt: group_size must be at least 2, got {group_size}")
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        advantage=raw,
        loss=GroupLoss(objective=partial(contrasts, kl=kl), score=implicit_reward),
    )
