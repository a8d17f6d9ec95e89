"""REINFORCE leave-one-out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import leave_one_out, per_group
from jaxrl_llm.algorithm import Algorithm, chain, optional
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.kl import kl_in_reward


def rloo(*, group_size: int = 4, kl: float | None = 0.05) -> Algorithm:
    """`reinforce` with the mean of the prompt's *other* responses as baseline, which is unbiased; KL in the reward.

    Source: "Back to Basics: Revisiting REINFORCE-Style Optimization for Learning from Human Feedback in LLMs",
      2402.14740. Whole responses are the actions: the loss sums over tokens.
    Deviations: a group of one has advantage 0 (there: no baseline).
    Limit: with kl=None it is `G / (G - 1)` times the centred rewards of `dr_grpo`.
    Family: policy gradient.

    Args:
      group_size: responses a prompt; the paper's k is 2 and 4.
      kl: weight of `log(pi / pi_ref)` in the reward; None or 0 drops the reference.
    """
    return replace(
        reinforce(group_size=group_size),
        reward=chain(verified, *optional(kl_in_reward, weight=kl)),
        advantage=partial(per_group, leave_one_out),
    )
