"""CISPO: clipped importance-sampling weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import group_mean_token_mean
from jaxrl_llm.losses.surrogates import clipped_weight


def cispo(*, group_size: int = 8, clip_low: float = 1.0, clip_high: float = 4.0) -> Algorithm:
    """`grpo` that clips the detached weight instead of the objective: no token ever loses its gradient. No divergence.

    PPO's clip silences exactly the rare tokens at which reasoning forks, from the second update of a batch on.

    Source: MiniMax-M1, 2506.13585, eq. 4 and 5. The mean is over the tokens of a prompt's group, then over prompts.
    Deviations: none known.
    Limit: at the old policy its gradient is that of REINFORCE with the same advantage and aggregation.
    Family: objective and clipping.

    Args:
      group_size: not given in the paper.  # not in the paper
      clip_low: 1: no lower bound, as in the paper.
      clip_high: upper width, tuned but not told in the paper.  # 4: weights up to 5, from ScaleRL, 2510.13786
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            surrogate=partial(clipped_weight, low=clip_low, high=clip_high), aggregate=group_mean_token_mean
        ),
    )
