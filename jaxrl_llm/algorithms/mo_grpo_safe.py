"""Multi-objective GRPO for safe generation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.combine import finished, weighted_sum
from jaxrl_llm.types import Batch

right_and_finished = partial(weighted_sum, rewards=(verified, finished), weights=(0.5, 0.5))


def mo_grpo_safe(
    *,
    group_size: int = 8,
    kl: float | None = 0.04,
    reward: Callable[[Batch], Array] = right_and_finished,
) -> Algorithm:
    """`grpo` on one number made of several objectives.

    Rows that trade one objective for another come out even; a group prefers those that are better in sum.

    Source: 2503.21819: one regression model scores safety, politeness, meaningfulness and actionability, and the
      weighted sum of the four is the reward.
    Deviations: the account used here is partial: weights and the KL weight are not the authors'. Their four-headed
      regression model is not part of this library: pass rewards of your own. The default is a stand-in with two
      objectives, the verifier's outcome and whether the response ended by itself.
    Limit: with one objective of weight 1, the outcome, it is `grpo`; a common factor of the weights changes nothing.
    Family: rewards and budgets.

    Args:
      group_size: 4 to 8 in the paper.
      kl: weight of the divergence in the loss.  # not in the paper
      reward: `weighted_sum` with `rewards`, each `(Batch) -> [B G]`, and as many `weights`.  # not in the paper
    """
    return replace(grpo(group_size=group_size, kl=kl), reward=reward)
