"""SPO-chain: credit for segments between the tokens a policy was unsure of."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.branches import credited, whiten_where
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain, optional
from jaxrl_llm.losses.aggregate import sequence_mean_token_sum
from jaxrl_llm.losses.kl import k3, kl_to_reference
from jaxrl_llm.losses.skipped import UnlessFar, clamped_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.together import Together, unselected
from jaxrl_llm.rollouts.branches import values_at
from jaxrl_llm.types import Batch, Prompts, Rollouts, Scores, World, masked, split
from jaxrl_llm.updates.passes import several_passes
from jaxrl_llm.weights.uncertain import uncertain


def segment_starts(logp: Array, mask: Array, *, threshold: float | Array, interval: int) -> Array:
    """`[T]` bool: the first and then every `interval`-th of the tokens with a probability below `threshold`."""
    unsure = mask & (jnp.exp(logp) < threshold)
    return unsure & ((jnp.cumsum(unsure) - 1) % interval == 0)


def segment_credit(starts: Array, value: Array, outcome: Array) -> Array:
    """What each segment gained, at its tokens `[T]`: the value of the next one's start, or the outcome, minus its own.

    Tokens before the first segment have 0, and so have segments one of whose ends has no score (NaN).
    """
    k, number = jnp.cumsum(starts) - 1, jnp.arange(value.size)
    after = jnp.where(number + 1 < starts.sum(), jnp.roll(value, -1), outcome)
    gained = (after - value)[jnp.maximum(k, 0)]
    return masked((k >= 0) & ~jnp.isnan(gained), gained)


def sample_segments(
    world: World, key: Array, prompts: Prompts, *, size: int, interval: int, completions: int, threshold: float | Array
) -> Rollouts:
    """Groups of `size` with the credit of their segments, which `completions` samples from each start value."""
    keys = split(key, "sample", "branch")
    rollouts = world.sample(keys["sample"], prompts, size)
    of_row = partial(segment_starts, threshold=threshold, interval=interval)
    starts = jax.vmap(jax.vmap(of_row))(rollouts.logp, rollouts.mask)
    most = -(-rollouts.tokens.shape[-1] // interval)
    value, sampled = values_at(world, keys["branch"], rollouts, starts, completions=completions, most=most)
    outcome = world.reward(rollouts)
    credit = masked(rollouts.mask, jax.vmap(jax.vmap(segment_credit))(starts, value, outcome))
    return replace(rollouts, outcome=outcome, credit=credit, generated=sampled + rollouts.mask.sum((-2, -1)))


def bounded_k3(d: Array) -> Array:
    """`k3`, at most 1e4."""
    return jnp.minimum(k3(d), 1e4)


def uncertain_kl(scores: Scores, batch: Batch, *, weight: float | Array, threshold: float | Array) -> Array:
    """`kl_to_reference` of the tokens with a probability below `threshold`, 0 at the others, `[B G T]`."""
    divergence = kl_to_reference(scores, batch, weight=weight, estimator=bounded_k3)
    return masked(uncertain(batch, threshold=threshold), divergence)


def spo_chain(
    *,
    group_size: int = 8,
    interval: int = 5,
    completions: int = 9,
    threshold: float = 0.9,
    clip: float = 0.2,
    kl: float | None = 1e-4,
    whitened: bool = True,
    minibatches: int = 1,
) -> Algorithm:
    """PPO's clip without a critic: a segment's credit is what the mean outcome of completions rises by along it.

    Segments start at tokens the policy was unsure of, and only such tokens are learnt from.

    Source: "Segment Policy Optimization", 2505.23564, SPO-chain, and its released code.
    Deviations: probabilities are those the sampler used (after temperature and top-p), not those of the bare model.
    Limit: with a threshold above 1 and an interval as long as a response, it is the centred policy gradient of `grpo`,
      the baseline being the mean outcome of fresh samples instead of that of the group.
    Family: credit.

    Args:
      group_size: G.
      interval: a segment starts at every so many unsure tokens.
      completions: samples from the start of each segment; 9 for short responses, 4 for long ones.
      threshold: unsure means a probability below it.
      clip: both widths.
      kl: weight of the divergence, summed over the unsure tokens of a row; None or 0 drops the reference.
      whitened: normalise over the unsure tokens of the batch, as the released code does and the equations do not.
      minibatches: optimiser steps a batch.  # 4 in the released code

    Raises:
      ValueError: a size below 1.
    """
    if interval < 1 or completions < 1:
        raise ValueError(f"spo_chain: interval and completions must be at least 1, got {interval} and {completions}")
    unsure = partial(uncertain, threshold=threshold)
    return Algorithm(
        rollout=partial(
            sample_segments, size=group_size, interval=interval, completions=completions, threshold=threshold
        ),
        advantage=chain(credited, partial(whiten_where, where=unsure)) if whitened else credited,
        weight=unsure,
        loss=UnlessFar(
            loss=Together(
                loss=PolicyLoss(ratio=clamped_ratio, surrogate=partial(clip_min, low=clip, high=clip)),
                terms=optional(uncertain_kl, weight=kl, threshold=threshold),
                tokens=unselected,
                share=sequence_mean_token_sum,
            )
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
