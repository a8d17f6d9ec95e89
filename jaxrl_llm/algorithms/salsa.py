"""SALSA: soup-based alignment learning for stronger adaptation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.updates.passes import several_passes
from jaxrl_llm.updates.soup import soup_first


def salsa(
    *,
    group_size: int = 1,
    clip: float = 0.2,
    kl: float = 0.05,
    share: float = 0.5,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` whose divergence is from the average of two fine-tuned models instead of from the one it starts from.

    Start the policy from the first and give the second as the reference: `learner(salsa(), params=first,
    reference=second)`. Both must come from one pre-trained model: the average of unrelated ones is no model. The first
    step makes the average and learns nothing.

    Source: "SALSA: Soup-based Alignment Learning for Stronger Adaptation in RLHF", 2411.01798.
    Deviations: described only in part: the average and its share are the paper's, the numbers of PPO are not. One step
      is spent on the average.
    Limit: with share=0 the reference is the second model, with share=1 the first, as in `ppo` with kl.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.
      clip: both widths.
      kl: weight of `log(pi / pi_ref)` in each token's reward.  # not in the paper
      share: of the first model in the average; 0.5, the midpoint, was best.
      epochs: passes over a batch.  # not in the paper
      minibatches: optimiser steps a pass.
    """
    return replace(
        ppo(group_size=group_size, clip=clip, kl=kl),
        update=partial(soup_first, share=share, update=partial(several_passes, epochs=epochs, minibatches=minibatches)),
    )
