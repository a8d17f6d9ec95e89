"""MinPRO: the minimum prefix ratio."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.cispo import cispo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.losses.surrogates import clipped_weight
from jaxrl_llm.types import Batch, Scores
from jaxrl_llm.updates.passes import several_passes


def prefix_ratio(scores: Scores, batch: Batch) -> Array:
    """`p_t * r_t`, `p_t` the smallest ratio of the row's earlier tokens that count (1 for the first), `[B G T]`."""
    ratio = token_ratio(scores, batch)
    seen = jnp.where(batch.mask, ratio, jnp.inf)
    before = jnp.pad(seen, [(0, 0), (0, 0), (1, 0)], constant_values=jnp.inf)[..., :-1]
    smallest = jax.lax.cummin(before, axis=before.ndim - 1)
    return jnp.where(jnp.isinf(smallest), 1.0, smallest) * ratio


def minpro(*, group_size: int = 8, clip_low: float = 0.2, clip_high: float = 0.28, minibatches: int = 4) -> Algorithm:
    """`cispo` whose weight also counts the prefix: the smallest earlier ratio stands for the product of them all.

    The exact off-policy weight of a token is the product of its prefix's ratios, which is too noisy to use. A prefix
    the policy has left damps all that follows it.

    Source: "A Step Back: Prefix Importance Ratio Stabilizes Policy Optimization", 2601.22718.
    Deviations: the order "minimum, times the token's own ratio, then clip" is our reading. The paper's data are two or
      more steps old; here the later mini-batches of a step are off-policy.
    Limit: with responses of one token it is `cispo` with the same widths and `token_mean`.
    Family: objective and clipping.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip_low: lower width.  # not in the paper
      clip_high: upper width.  # not in the paper
      minibatches: optimiser steps a batch; the prompts must divide into them.  # not in the paper
    """
    return replace(
        cispo(group_size=group_size),
        loss=PolicyLoss(
            ratio=prefix_ratio,
            surrogate=partial(clipped_weight, low=clip_low, high=clip_high),
            aggregate=token_mean,
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
