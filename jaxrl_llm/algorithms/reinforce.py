"""REINFORCE."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.baseline import batch_mean
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.losses.aggregate import sequence_mean_token_sum
from jaxrl_llm.losses.surrogates import log_likelihood
from jaxrl_llm.rollouts.group import sample_group


def reinforce(*, group_size: int = 8) -> Algorithm:
    """The score-function gradient with the batch's mean reward as baseline. Everything else is this plus something.

    Source: Williams, 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
      learning", theorem 1; aggregated as the gradient of the sequence log-prob.
    Deviations: the baseline is the mean of this step, not a running one (`advantages.baseline.running_mean` is that),
      so the gradient is too small by the factor `1 - 1/rows`.
    Limit: with the advantage slot of `rloo` it is `rloo` without the divergence.
    Family: policy gradient.

    Args:
      group_size: responses a prompt.  # not in the paper
    """
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        advantage=batch_mean,
        loss=PolicyLoss(surrogate=log_likelihood, aggregate=sequence_mean_token_sum),
    )
