"""Demonstration-regularised RL."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import leave_one_out, per_group
from jaxrl_llm.advantages.sources import among_own
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.rloo import rloo
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.rollouts.mixed import before_step, logged_or_sampled
from jaxrl_llm.updates.restart import restarting


def demo_reg(*, group_size: int = 4, kl: float = 0.05, cloning_steps: int = 100) -> Algorithm:
    """Behaviour cloning first, then RL with the divergence from the clone.

    The optimum of the second phase is `pi_BC * exp(Q / kl)`: where demonstrations are good, little is left to explore.

    Source: "Demonstration-Regularized RL", 2310.17303: the two phases and the regularised objective.
    Deviations: described only in part. The paper is theory on tabular and linear problems; REINFORCE leave-one-out
      stands for its planner, maximum likelihood for its smoothed estimate (let the cloning stop early, or the
      divergence from the clone has no bound). The optimiser starts anew between the phases.
    Limit: with cloning_steps=0 it is `rloo`, and the reference is the one the run was given.
    Family: divergence and entropy.

    Args:
      group_size: samples a prompt in the second phase.  # not in the paper
      kl: lambda; 0.001 to 0.05 is usual for language models.  # not in the paper
      cloning_steps: of maximum likelihood on each prompt's best logged response.  # not in the paper

    Raises:
      ValueError: `cloning_steps` is negative.
    """
    if cloning_steps < 0:
        raise ValueError(f"demo_reg: cloning_steps must be 0 or more, got {cloning_steps}")
    parent = rloo(group_size=group_size, kl=kl)
    return replace(
        parent,
        rollout=partial(logged_or_sampled, size=group_size, which=partial(before_step, step=cloning_steps)),
        advantage=partial(among_own, advantage=partial(per_group, leave_one_out)),
        loss=MixedLoss(
            parts={
                "own": Part(rows=own, loss=parent.loss),
                "cloning": Part(rows=injected, loss=NegativeLogLikelihood()),
            }
        ),
        update=partial(restarting, step=cloning_steps),
    )
