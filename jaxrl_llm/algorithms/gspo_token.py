"""GSPO with a ratio a token may differ in."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.gspo import gspo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.ratio import sequence_ratio_per_token
from jaxrl_llm.losses.surrogates import clip_min


def gspo_token(
    *, group_size: int = 8, clip_low: float = 3e-4, clip_high: float = 4e-4, minibatches: int = 4
) -> Algorithm:
    """`gspo` with the response's ratio in value and the token's own in gradient: advantages may differ by token.

    Source: 2507.18071, eq. 13 and 14.
    Deviations: none known.
    Limit: where the advantage is constant over a response it is `gspo`, in value and gradient.
    Family: objective and clipping.

    Args:
      group_size: not given in the paper.  # not in the paper
      clip_low: lower width.
      clip_high: upper width.
      minibatches: optimiser steps a batch; the prompts must divide into them.
    """
    return replace(
        gspo(group_size=group_size, minibatches=minibatches),
        loss=PolicyLoss(
            ratio=sequence_ratio_per_token,
            surrogate=partial(clip_min, low=clip_low, high=clip_high),
            aggregate=sequence_mean_token_mean,
        ),
    )
