"""SPO: single-stream policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.prompts.choose import kept, take
from jaxrl_llm.rollouts.tracker import Memory, Number, Prior, empty, remember, settled, undecided
from jaxrl_llm.stats import standardise
from jaxrl_llm.types import Batch, Prompts, Rollouts, Stage, World, split
from jaxrl_llm.updates.passes import several_passes


def priority(value: Array, *, explore: Number) -> Array:
    """`sqrt(v (1 - v)) + explore`: prompts that may go either way, and some of the others."""
    return jnp.sqrt(jnp.maximum(value * (1 - value), 0.0)) + explore


def sample_one(
    memory: Memory, key: Array, world: World, prompts: Prompts, *, candidates: int, explore: Number, half: Number,
    lowest: Number, highest: Number,
) -> tuple[Rollouts, Memory]:  # fmt: skip
    """One response to each prompt chosen by priority; `credit` is what its prompt was expected to earn, taken off."""
    memory, keys = settled(memory, world, half=half, lowest=lowest, highest=highest), split(key, "choose", "sample")
    weight = priority(memory["value"][prompts.index], explore=explore)
    shape = (kept(prompts, candidates),)
    rows = jax.random.choice(keys["choose"], weight.size, shape, replace=False, p=weight / weight.sum())
    rollouts = world.sample(keys["sample"], take(prompts, jnp.sort(rows)), 1)
    expected = memory["value"][rollouts.prompts.index]
    return replace(rollouts, credit=jnp.broadcast_to(-expected[:, None, None], rollouts.tokens.shape)), memory


def above_expected(batch: Batch) -> Array:
    """`R - v` over its mean and deviation in the batch, `[B G T]`; `v = 0` for rollouts that expected nothing."""
    credit = batch.rollouts.credit
    gain = row_reward(batch) if credit is None else row_reward(batch) + credit[..., 0]
    return over_tokens(batch, standardise(gain, batch.rows, eps=1e-8))


def spo_single_stream(
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    bound: float = 10.0,
    candidates: int = 4,
    explore: float = 0.05,
    half: float = 0.06,
    lowest: float = 0.875,
    highest: float = 0.96,
    prior: Prior = undecided,
    minibatches: int = 1,
) -> Algorithm:
    """PPO's clip with one response a prompt, against an estimate of the prompt's success rate that outlives the step.

    The estimate forgets as fast as the policy moved on the prompt; no group is sampled only to be compared with.

    Source: "Single-stream Policy Optimization", 2509.13232, and its released recipe.
    Deviations: prompts are chosen from those drawn for the step, not from the whole data set. The estimate starts
      undecided; there, from 8 responses a prompt (`from_samples`). It is kept as mean and count, which is the same and
      also holds for rewards outside 0 to 1. The loss is a mean over tokens.
    Limit: with an estimate of 0 for all prompts, rows of one token and equal clips it is `reinforce_pp` with kl=None.
    Family: policy gradient.

    Args:
      clip_low: lower width.
      clip_high: upper width.
      bound: where the advantage is negative, the ratio beyond which there is no gradient.
      candidates: prompts drawn for each one answered; a step answers `B / candidates`.  # not in the paper
      explore: added to the priority of every prompt.
      half: D_half, nats a token: how far the policy must move to forget half.
      lowest: least of the past that is kept.
      highest: most of the past that is kept.
      prior: `(Problem) -> (success rate [P], number of observations [P])` at the start.
      minibatches: optimiser steps a batch; 8 in the paper.  # 1: the clip acts from the second on

    Raises:
      ValueError: no candidates.
    """
    if candidates < 1:
        raise ValueError(f"spo_single_stream keeps one prompt of `candidates`, at least 1, got {candidates}")
    numbers: dict[str, Any] = {"explore": explore, "half": half, "lowest": lowest, "highest": highest}
    return Algorithm(
        rollout=Stage(
            init=partial(empty, prior=prior, candidates=candidates),
            apply=partial(sample_one, candidates=candidates, **numbers),
            observe=remember,
        ),
        advantage=above_expected,
        loss=PolicyLoss(surrogate=partial(dual_clip, low=clip_low, high=clip_high, bound=bound)),
        update=partial(several_passes, minibatches=minibatches),
    )
