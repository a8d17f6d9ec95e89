"""Proximal policy optimisation with a critic."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.gae import gae, returns
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain, optional
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.kl import kl_in_reward
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.updates.passes import several_passes


def ppo(
    *,
    group_size: int = 1,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 1.0,
    entropy: float | None = None,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl: float | None = None,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """Several clipped updates a batch, with a critic's generalised advantages, whitened over the batch's tokens.

    Source: 1707.06347, eq. 7 (clip) and 9 (value and entropy terms); GAE 1506.02438; in its form for language models
      (2203.02155; 2005.12729 for value clipping and whitening).
    Deviations: the whole batch is scored once before the update, and never again between epochs.
    Limit: lam=1 and a critic that says 0 make the advantage the whitened reward-to-go of `reinforce_pp`.
    Family: policy gradient.

    Args:
      group_size: responses a prompt.
      clip: both widths, table 3.
      value_clip: how far the critic may move in a step.  # from 2005.12729
      value_weight: c_1, table 5.
      entropy: c_2; None or 0 for none, as in eq. 9 without it.
      gamma: discount a token.  # 1: usual for language models
      lam: of GAE, table 3.
      kl: weight of `log(pi / pi_ref)` in each token's reward.  # not in 1707.06347; 0.02 in 2203.02155
      epochs: passes over a batch.  # 3 to 10 in the paper, 4 usual for language models
      minibatches: optimiser steps a pass.
    """
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        reward=chain(verified, *optional(kl_in_reward, weight=kl)),
        advantage=chain(partial(gae, gamma=gamma, lam=lam), whiten),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            aggregate=token_mean,
            terms=(
                partial(
                    value_loss, returns=partial(returns, gamma=gamma, lam=lam), weight=value_weight, clip=value_clip
                ),
                *optional(entropy_bonus, weight=entropy),
            ),
        ),
        update=partial(several_passes, epochs=epochs, minibatches=minibatches),
    )
