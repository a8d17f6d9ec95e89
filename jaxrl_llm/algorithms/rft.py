"""Rejection-sampling fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.algorithms.sft import sft
from jaxrl_llm.filters.basic import correct, distinct
from jaxrl_llm.rollouts.group import sample_group


def rft(*, group_size: int = 8) -> Algorithm:
    """`sft` on what the policy itself got right, each distinct response once.

    Source: "Scaling Relationship on Learning Mathematical Reasoning with Large Language Models", 2308.01825.
    Deviations: online: samples come from the current policy each step, not once from a fine-tuned one, and the logged
      solutions are not added. Responses are the same if their tokens are, not if their equations are. The paper samples
      at temperature 0.7.
    Limit: without repeated responses its gradient is, up to scale, REINFORCE with `A = R` in {0, 1}.
    Family: supervised and mixed data.

    Args:
      group_size: 100 in the paper.  # 8: not in the paper
    """
    return replace(sft(), rollout=partial(sample_group, size=group_size), filter=chain(correct, distinct))
