"""HAPO: heterogeneous adaptive policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.stats import masked_quantile
from jaxrl_llm.types import Batch, Scores, masked


def entropy_level(scores: Scores, batch: Batch, *, pivot: float | Array) -> dict[str, Array]:
    """`{"level": [B G T]}` in [-1, 1]: each token's log-entropy, 0 at its `pivot` quantile over the step.

    Divided by the largest above and the size of the smallest below.
    """
    if scores.entropy is None:
        raise ValueError("entropy_level needs scores.entropy")
    h = masked(batch.mask, jnp.log(jnp.maximum(masked(batch.mask, scores.entropy, 1.0), 1e-8)))
    h = masked(batch.mask, h - masked_quantile(h, batch.mask, pivot))
    largest = jnp.where(h > 0, h.max(), -h.min())
    return {"level": h / jnp.where(largest > 0, largest, 1.0)}


def heterogeneous(
    ratio: Array,
    advantage: Array,
    logp: Array,
    *,
    level: Array,
    low: float | Array,
    high: float | Array,
    widen: float | Array,
    shift: float | Array,
    bound: float | Array,
) -> Array:
    """`dual_clip` whose widths and advantages depend on a token's entropy level.

    Certain tokens get a wider lower bound, uncertain ones a wider upper. Advantages change by `1 + shift * level`:
    of uncertain tokens that left the inner half of the bounds, and of certain ones that did not.
    """
    low = jnp.where(level > 0, low, low * (1 - widen * level))
    high = jnp.where(level > 0, high * (1 + widen * level), high)
    inside = (ratio > 1 - low / 2) & (ratio < 1 + high / 2)
    changed = advantage * (1 + shift * level)
    return dual_clip(ratio, jnp.where((level > 0) ^ inside, changed, advantage), logp, low=low, high=high, bound=bound)


def token_center_scale(reward: Array, length: Array, *, most: float | Array, eps: float = 1e-6) -> Array:
    """`(R_i - mean) / (std + eps)`, `[G]`, over the group's tokens, so that long rows count more.

    Rows of length 0 are not there. Where any is `most` or more in size, the group's are those of `center_scale`.
    """
    keep, n = length > 0, jnp.maximum(length.sum(), 1)
    below = masked(keep, reward - jnp.max(reward, where=keep, initial=-jnp.inf))
    deviation = masked(keep, below - (length * below).sum() / n)
    std = jnp.sqrt((length * jnp.square(deviation)).sum() / n)
    credit = deviation / (std + eps)
    return jnp.where((jnp.abs(credit) >= most).any(), center_scale(reward, keep, eps=eps), credit)


def per_token_of_group(batch: Batch, *, most: float | Array) -> Array:
    """`token_center_scale` of every group, `[B G T]`."""
    fn = partial(token_center_scale, most=most)
    return over_tokens(batch, jax.vmap(fn)(row_reward(batch), batch.mask.sum(-1).astype(jnp.float32)))


def hapo_het(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    pivot: float = 0.8,
    widen: float = 1.0,
    shift: float = 1.0,
    most: float = 5.0,
    bound: float = 10.0,
    limit: int | None = None,
    cache: int | None = None,
    minibatches: int = 1,
) -> Algorithm:
    """`dapo` that treats a token by how uncertain the policy is there, relative to the step.

    Source: "From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature", 2509.16591, and its
      code.
    Deviations: tokens are sampled at one temperature (the paper raises it where entropy is high). The code divides low
      log-entropies by their signed minimum: they look high; here they do not. Statistics are the step's, not a part's.
    Limit: with widen=0, shift=0 and most=0 it is `dapo` with equal widths and the dual clip.
    Family: credit.

    Args:
      group_size: 16 in the paper.  # 8: not in the paper
      clip: both widths, before they are widened.
      pivot: quantile of the log-entropy that counts as neutral.
      widen: how much a clip width grows with the level.
      shift: how much an advantage changes with it.
      most: of an advantage: groups that reach it have those of `grpo`.
      bound: of the ratio where the advantage is negative.
      limit: tokens, as in `dapo`; 10k in the paper, the generation budget if None.
      cache: tokens, as in `dapo`; 4k in the paper.
      minibatches: optimiser steps a batch; 16 in the paper.  # 1: not in the paper
    """
    return replace(
        dapo(group_size=group_size, limit=limit, cache=cache, minibatches=minibatches),
        advantage=partial(per_token_of_group, most=most),
        loss=PolicyLoss(
            surrogate=partial(heterogeneous, low=clip, high=clip, widen=widen, shift=shift, bound=bound),
            aggregate=token_mean,
            prepare=partial(entropy_level, pivot=pivot),
        ),
    )
