"""Supervised fine-tuning."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.basic import uniform
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.rollouts.logged import logged


def sft() -> Algorithm:
    """Cross entropy on each prompt's best logged response; the mean is over tokens, EOS included, prompts excluded.

    Source: 2203.02155, section 3.5, for the term; the loss is maximum likelihood.
    Deviations: none.
    Limit: its gradient is that of REINFORCE with `A = 1` and a token mean.
    Family: supervised and mixed data.
    """
    return Algorithm(rollout=partial(logged, take=1), advantage=uniform, loss=NegativeLogLikelihood())
