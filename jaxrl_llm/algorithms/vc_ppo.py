"""Value-calibrated PPO."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.gae import returns
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.updates.critic import critic_first
from jaxrl_llm.updates.passes import several_passes


def vc_ppo(
    *,
    group_size: int = 1,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_lam: float = 1.0,
    pretraining: int = 50,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` for long responses: the critic learns first, and towards the return, however long the way to the reward.

    With lam=0.95 nothing of a reward is left 100 tokens before it; the critic's target needs no such shortening.

    Source: "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret", 2503.01491: value
      pretraining, decoupled GAE.
    Deviations: value pretraining is the first steps of the run, with fresh samples of the policy at rest, and counted,
      not stopped when the explained variance is stable.
    Limit: value_lam equal to lam and pretraining=0 is `ppo`.
    Family: policy gradient.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip: both widths.
      value_clip: how far the critic may move in a step.
      value_weight: of the critic's loss.  # as in `ppo`
      gamma: discount a token.
      lam: of the policy's advantage.
      value_lam: of the critic's target; 1 is the return.
      pretraining: steps in which only the critic learns; about 50 in the paper.
      epochs: passes over a batch.  # as in `ppo`
      minibatches: optimiser steps a pass.  # as in `ppo`
    """
    return replace(
        ppo(group_size=group_size, gamma=gamma, lam=lam),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            terms=(
                partial(
                    value_loss,
                    returns=partial(returns, gamma=gamma, lam=value_lam),
                    weight=value_weight,
                    clip=value_clip,
                ),
            ),
        ),
        update=partial(
            critic_first, steps=pretraining, update=partial(several_passes, epochs=epochs, minibatches=minibatches)
        ),
    )
