"""Prompt-GDRO: bins of prompts by difficulty, reweighted against the learner."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.prompts.difficulty import failures, unvisited, visited
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Problem, Stage, masked
from jaxrl_llm.updates.passes import several_passes

Memory = dict[str, Any]  # the history of prompts, the score of each bin, and whether it has one


def no_scores(problem: Problem, *, window: int, bins: int) -> Memory:
    """Nothing was seen."""
    history = unvisited(problem, window=window, bins=bins)
    return {"history": history, "score": jnp.zeros(bins), "scored": jnp.zeros(bins, bool)}


def bin_shares(score: Array, present: Array, *, eta: float | Array, gamma: float | Array) -> Array:
    """`(1 - gamma) * omega_b / sum(omega) + gamma / bins`, `omega = exp(eta * S)`, over the bins that are present."""
    omega = masked(present, jnp.exp(eta * (score - jnp.max(score, where=present, initial=-jnp.inf))))
    share = (1 - gamma) * omega / jnp.maximum(omega.sum(), 1e-30) + gamma / jnp.maximum(present.sum(), 1)
    return masked(present, share)


def row_weights(share: Array, bin: Array, rows: Array, *, cap: float | Array) -> Array:
    """The share (`[bins]`) of each row's bin (`[B]`) by the mean over all rows (`[B G]`), at most `cap`, `[B G]`."""
    of_row = jnp.broadcast_to(share[bin][:, None], rows.shape)
    mean = masked_mean(of_row, rows)
    return masked(rows, jnp.minimum(of_row / jnp.where(mean > 0, mean, 1.0), cap))


def reweighted(
    memory: Memory,
    key: Array,
    batch: Batch,
    *,
    rate: float | Array,
    eta: float | Array,
    gamma: float | Array,
    cap: float | Array,
    hysteresis: float | Array,
) -> tuple[Array, Memory]:
    """Row weights `[B G]`, and the memory with this step's failures in the scores of their bins."""
    bins = memory["score"].shape[0]
    history = visited(memory["history"], batch, bins=bins, hysteresis=hysteresis)
    bin = history["bin"][batch.prompts.index]
    loss = failures(bin, batch, bins=bins)
    present, old = loss.size > 0, memory["score"]
    new = jnp.where(memory["scored"], (1 - rate) * old + rate * loss.mean, loss.mean)
    score = jnp.where(present, new, old)
    weight = row_weights(bin_shares(score, present, eta=eta, gamma=gamma), bin, batch.rows, cap=cap)
    return weight, {"history": history, "score": score, "scored": memory["scored"] | present}


def prompt_gdro(
    *,
    group_size: int = 4,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    kl: float | None = 1e-3,
    bins: int = 10,
    window: int = 50,
    rate: float = 0.12,
    eta: float = 0.65,
    gamma: float = 0.01,
    cap: float = 15.0,
    hysteresis: float = 0.03,
    minibatches: int = 4,
) -> Algorithm:
    """`grpo` with a weight for each difficulty, found by an adversary that prefers bins of prompts with high loss.

    Source: "Prompt-GDRO and Rollout-GDRO", 2601.19280; weights relative to their mean over rows from its code.
    Deviations: the loss of a bin is the share of its rollouts that fail: the surrogate's, on-policy, is near 0 in every
      bin. Not divided by the bin's share of the batch, which the released scripts do. Advantages are not clipped at 5,
      which groups of 4 do not reach.
    Limit: with eta=0 every weight is 1, and it is `grpo` with these clip widths.
    Family: sampling and curricula.

    Args:
      group_size: rollouts a prompt.
      clip_low, clip_high: widths.
      kl: weight of the divergence in the loss.
      bins: equal intervals of the share of visits with a correct rollout.
      window: visits of a prompt that are remembered.
      rate: beta_s, of the moving average of a bin's loss.
      eta: of the exponential weights.
      gamma: how much is shared out equally.
      cap: largest weight of a row.
      hysteresis: how far from its bin an estimate must be to leave it.
      minibatches: optimiser steps a batch.
    """
    return replace(
        grpo(group_size=group_size, kl=kl),
        weight=Stage(
            init=partial(no_scores, window=window, bins=bins),
            apply=partial(reweighted, rate=rate, eta=eta, gamma=gamma, cap=cap, hysteresis=hysteresis),
        ),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip_low, high=clip_high),
            aggregate=sequence_mean_token_mean,
            terms=optional(kl_to_reference, weight=kl),
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
