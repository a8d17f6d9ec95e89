"""Rollout-GDRO: a fixed budget of rollouts, allocated to bins of prompts by a bandit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.prompt_gdro import prompt_gdro
from jaxrl_llm.prompts.difficulty import failures, unvisited, visited
from jaxrl_llm.rollouts.ragged import most_probable, sample_ragged
from jaxrl_llm.types import Batch, Problem, Prompts, Rollouts, Stage, World, split
from jaxrl_llm.weights.basic import ones

Memory = dict[str, Any]  # history of prompts, score of each size for each bin, the sizes played last, the price
Number = float | Array


def no_scores(problem: Problem, *, window: int, bins: int, sizes: range) -> Memory:
    """Nothing was played."""
    zero = {"score": jnp.zeros((bins, len(sizes))), "played": jnp.zeros(bins, jnp.int32), "price": jnp.zeros(())}
    return {"history": unvisited(problem, window=window, bins=bins), **zero}


def probabilities(score: Array, *, eta: Number, gamma: Number) -> Array:
    """`(1 - gamma) * softmax(eta * score) + gamma / sizes`, `[bins sizes]`."""
    return (1 - gamma) * jax.nn.softmax(eta * score) + gamma / score.shape[-1]


def play(
    memory: Memory, key: Array, world: World, prompts: Prompts, *, sizes: range, mean: int, explore: Number, chance: Any
) -> tuple[Rollouts, Memory]:
    """Groups of the most probable sizes that spend the budget exactly, one size a bin."""
    keys, bin = split(key, "explore", "sample"), memory["history"]["bin"][prompts.index]
    chances = chance(memory["score"])
    logp = jnp.log(chances) + explore * jax.random.gumbel(keys["explore"], chances.shape)
    count, all_sizes = jnp.bincount(bin, length=chances.shape[0]), jnp.array(sizes)
    played = most_probable(logp, count, all_sizes, budget=mean * bin.shape[0])
    rollouts = sample_ragged(world, keys["sample"], prompts, all_sizes[played[bin]], largest=sizes[-1])
    return rollouts, {**memory, "played": played}


def settle(memory: Memory, batch: Batch, *, sizes: range, mean: int, rate: Number, hysteresis: Number) -> Memory:
    """Adds `loss - price * (n - mean)` to the score of what each bin played; the price rises by rows beyond `mean`."""
    score, played, price = memory["score"], memory["played"], memory["price"]
    bins, size = score.shape[0], jnp.array(sizes)[played]
    loss = failures(memory["history"]["bin"][batch.prompts.index], batch, bins=bins)
    gain = jnp.where(loss.size > 0, loss.mean - price * (size - mean), 0.0)
    groups = batch.rows.any(-1).sum()
    over = batch.rows.sum() / jnp.maximum(groups, 1) - jnp.where(groups > 0, mean, 0)
    return {
        "history": visited(memory["history"], batch, bins=bins, hysteresis=hysteresis),
        "score": score.at[jnp.arange(bins), played].add(gain),
        "played": played,
        "price": price + rate * over,
    }


def rollout_gdro(
    *,
    group_size: int = 4,
    smallest: int = 2,
    largest: int = 12,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: float | None = 1e-3,
    bins: int = 10,
    window: int = 50,
    eta: float = 0.65,
    gamma: float = 0.01,
    explore: float = 1.0,
    rate: float = 0.05,
    hysteresis: float = 0.03,
    minibatches: int = 4,
) -> Algorithm:
    """`grpo` with groups of different sizes: an adversary gives the rollouts of a step to the bins with high loss.

    Source: "Prompt-GDRO and Rollout-GDRO", 2601.19280; Rollout-GDRO as in the paper. In its code the scores never move.
    Deviations: the loss of a bin is the share of its rollouts that fail. Sizes are drawn (Gumbel noise on their
      log-probabilities) where the paper takes the most probable ones, all equal at the start. The budget is always met,
      so the price moves only with rows that could not be scored. Advantages are not clipped at 5, which these groups
      do not reach.
    Limit: with smallest and largest equal to group_size it is `grpo` with these clip widths.
    Family: sampling and curricula.

    Args:
      group_size: mean over the prompts of a step.
      smallest, largest: group; all are padded to the largest.
      clip_low, clip_high: widths.
      kl: weight of the divergence in the loss.
      bins: equal intervals of the share of visits with a correct rollout.
      window: visits of a prompt that are remembered.
      eta: of the exponential weights.  # that of Prompt-GDRO
      gamma: how much probability is shared out equally.  # that of Prompt-GDRO
      explore: scale of the noise; 0 for the most probable sizes.  # not in the paper
      rate: of the price.
      hysteresis: how far from its bin an estimate must be to leave it.
      minibatches: optimiser steps a batch.

    Raises:
      ValueError: sizes out of order, of which no choice has this mean.
    """
    if not 1 <= smallest <= group_size <= largest:
        raise ValueError(f"rollout_gdro: {smallest=} must be 1 to {group_size=}, which must be at most {largest=}")
    parent = prompt_gdro(group_size=group_size, clip_low=clip_low, clip_high=clip_high, kl=kl, minibatches=minibatches)
    sizes, chance = range(smallest, largest + 1), partial(probabilities, eta=eta, gamma=gamma)
    return replace(
        parent,
        rollout=Stage(
            init=partial(no_scores, window=window, bins=bins, sizes=sizes),
            apply=partial(play, sizes=sizes, mean=group_size, explore=explore, chance=chance),
            observe=partial(settle, sizes=sizes, mean=group_size, rate=rate, hysteresis=hysteresis),
        ),
        weight=ones,
    )
