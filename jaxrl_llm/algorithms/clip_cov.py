"""Clip-Cov: no gradient for a few tokens whose log-prob and advantage covary."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.covariance import at_least_one, covariance
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.stats import largest
from jaxrl_llm.types import Batch, Scores, masked


def lots(step: Array, index: Array, tokens: Array, mask: Array) -> Array:
    """Uniform numbers of one row, `[T]`, keyed by what the row says: the same wherever it stands and however padded."""
    place = jnp.arange(tokens.size, dtype=jnp.int32)
    content = jnp.sum(masked(mask, tokens.astype(jnp.int32)) * (2 * place + 1))
    key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), index), content)
    return jax.vmap(lambda t: jax.random.uniform(jax.random.fold_in(key, t)))(place)


def stopped_at_random(
    scores: Scores,
    batch: Batch,
    *,
    share: float | Array,
    above: float | Array,
    below: float | Array,
    low: float | Array,
    high: float | Array,
) -> dict[str, Array]:
    """Which tokens lose their gradient, `[B G T]` bool, and the widths of the clip for the others.

    `max(1, int(share * N))` of those with `above < covariance < below` that the clip leaves alone, by lot.

    Raises:
      ValueError: no advantage was computed.
    """
    if batch.advantage is None:
        raise ValueError("stopped_at_random needs batch.advantage")
    ratio, advantage = token_ratio(scores, batch), masked(batch.mask, batch.advantage)
    clipped = advantage * jnp.clip(ratio, 1 - low, 1 + high) < advantage * ratio
    value = covariance(scores, batch)
    some = batch.mask & ~clipped & (value > above) & (value < below)
    rows = jax.vmap(jax.vmap(lots, (None, None, 0, 0)), (None, 0, 0, 0))
    lot = rows(batch.step, batch.prompts.index, batch.rollouts.tokens, batch.rollouts.mask)
    chosen = largest(lot, some, at_least_one(share, batch.mask))
    return {"stopped": chosen, "low": jnp.asarray(low), "high": jnp.asarray(high)}


def clip_unless_stopped(
    ratio: Array, advantage: Array, logp: Array, *, stopped: Array, low: Array, high: Array
) -> Array:
    """`clip_min`, and 0 at the stopped tokens, which stay in the denominator."""
    return masked(~stopped, clip_min(ratio, advantage, logp, low=low, high=high))


def clip_cov(
    *,
    group_size: int = 8,
    clip_low: float = 1.0,
    clip_high: float = 1.0,
    share: float = 2e-4,
    above: float = 1.0,
    below: float = 5.0,
    minibatches: int = 4,
) -> Algorithm:
    """`dapo` that silences, by lot, a few of the tokens that make entropy fall: those of high covariance.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2505.22617 (Clip-Cov); clip
      widths of the released scripts.
    Deviations: the lot is drawn from the tokens themselves and the step, so that it does not depend on how a step is
      split; no length punishment.
    Limit: where no covariance is above `above` (infinity) it is `dapo` with the same reward and widths.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip_low: lower width; 1 switches that bound off.
      clip_high: upper width.
      share: of the step's tokens, how many lose their gradient.
      above: the least covariance of such a token.
      below: the greatest.
      minibatches: optimiser steps a batch.  # not in the paper
    """
    return replace(
        dapo(group_size=group_size, minibatches=minibatches),
        reward=verified,
        loss=PolicyLoss(
            surrogate=clip_unless_stopped,
            aggregate=token_mean,
            prepare=partial(stopped_at_random, share=share, above=above, below=below, low=clip_low, high=clip_high),
        ),
    )
