"""PPO-max: PPO with the implementation choices that keep it stable."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.gae import gae
from jaxrl_llm.algorithm import Algorithm, chain, optional
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.kl import kl_in_reward
from jaxrl_llm.rewards.running import clipped, running_standard
from jaxrl_llm.updates.critic import critic_first
from jaxrl_llm.updates.passes import several_passes


def ppo_max(
    *,
    group_size: int = 1,
    clip: float = 0.2,
    value_clip: float = 0.2,
    reward_clip: float = 10.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl: float | None = 0.05,
    critic_steps: int = 20,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` with rewards normalised over the run and clipped, a penalty at each token for leaving the reference, and a
    critic that learns before the policy moves. Advantages are not normalised.

    Start the critic from the reward model if there is one: its backbone, its head or both.

    Source: "Secrets of RLHF in Large Language Models Part I: PPO", 2307.04964, and the code of MOSS-RLHF.
    Deviations: without the optional language-modelling loss on pre-training data, and without a buffer of earlier
      rollouts. The gradient's norm is clipped by the optimiser (`updates.optimizer.adamw` does).
    Limit: with the `verified` rewards, kl=None and critic_steps=0 it is `ppo` without the whitening.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.
      clip: both widths.
      value_clip: how far the critic may move in a step.
      reward_clip: delta, after the normalisation; the released code's.
      gamma: discount a token.
      lam: of GAE.
      kl: eta; 0.05 in the paper's runs, 0.02 in the released code's defaults; None or 0 drops the reference.
      critic_steps: steps in which only the critic learns.  # not in the paper: it does, for how long was not read
      epochs: passes over a batch.  # not in the paper
      minibatches: optimiser steps a pass.
    """
    passes = partial(several_passes, epochs=epochs, minibatches=minibatches)
    return replace(
        ppo(group_size=group_size, clip=clip, value_clip=value_clip, gamma=gamma, lam=lam),
        reward=chain(
            verified, running_standard(), partial(clipped, bound=reward_clip), *optional(kl_in_reward, weight=kl)
        ),
        advantage=partial(gae, gamma=gamma, lam=lam),
        update=partial(critic_first, steps=critic_steps, update=passes),
    )
