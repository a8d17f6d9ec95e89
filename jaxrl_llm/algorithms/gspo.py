"""Group sequence policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.ratio import sequence_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.updates.passes import several_passes


def gspo(*, group_size: int = 8, clip_low: float = 3e-4, clip_high: float = 4e-4, minibatches: int = 4) -> Algorithm:
    """`grpo` with one importance ratio a response, the geometric mean of its tokens', clipped as a whole.

    A reward is given to a response, so its correction should be too; a product of token ratios is noise. No divergence.

    Source: 2507.18071, eq. 5 to 7; widths and mini-batches of section 5.1.
    Deviations: none known.
    Limit: with responses of one token it is `grpo` with kl=None and the same widths.
    Family: objective and clipping.

    Args:
      group_size: not given in the paper.  # not in the paper
      clip_low: lower width, about 1000 times smaller than PPO's.
      clip_high: upper width.
      minibatches: optimiser steps a batch; the prompts must divide into them.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            ratio=sequence_ratio,
            surrogate=partial(clip_min, low=clip_low, high=clip_high),
            aggregate=sequence_mean_token_mean,
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
