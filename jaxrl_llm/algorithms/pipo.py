"""PIPO: policy improvement policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.rollouts.resume import buffer
from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.types import Batch, Learn, Memory, Problem, Stage, masked
from jaxrl_llm.updates.passes import select, several_passes

_KEPT = ("context", "tokens", "mask", "role", "logp", "entropy", "version", "truncated", "sampling")


def improvement(mean: Array, window: Array, count: Array) -> Array:
    """`xi = clip(mean - mu, -5, 5) / sd` over the last `count` means of `window` `[K]`, the newest last."""
    there = jnp.arange(window.shape[0]) >= window.shape[0] - count
    std = jnp.sqrt(masked_var(window, there, ddof=0))
    return jnp.clip(mean - masked_mean(window, there), -5.0, 5.0) / jnp.where(std < 1e-8, 1.0, std)


def of_size_one(advantage: Array, mask: Array) -> Array:
    """`G A_i / (sum_j |A_j| + 1e-6)` of a group, `[G T]`: the rows that count have mean size 1."""
    size = jnp.abs(masked_mean(advantage, mask, axis=-1))
    return masked(mask, mask.any(-1).sum() * advantage / (size.sum() + 1e-6))


def nothing_yet(problem: Problem, *, size: int, window: int) -> Memory:
    """Room for the means of `window` steps and for the step before."""
    rollouts = buffer(problem, groups=problem.prompts, size=size)
    rows = {"keep": jnp.zeros(rollouts.mask.shape[:2], bool), "outcome": jnp.zeros(rollouts.mask.shape[:2])}
    rows["advantage"] = jnp.zeros(rollouts.mask.shape)
    return {"window": jnp.zeros(window), "count": jnp.zeros((), jnp.int32), "rollouts": rollouts, **rows}


def remembered(memory: Memory, batch: Batch) -> Memory:
    """With this step's mean at the end of the window, and this batch in place of the one before."""
    some, mean = batch.rows.any(), masked_mean(row_reward(batch), batch.rows)
    means = jnp.where(some, jnp.append(memory["window"][1:], mean), memory["window"])
    # A gather: a step's prompts may be split over devices, and memory is whole on each.
    batch = select(batch, jnp.arange(batch.rows.shape[0]))
    # What the verifier was told is not asked for again, and may not be a number.
    prompts = replace(batch.prompts, target=memory["rollouts"].prompts.target)
    rollouts = replace(memory["rollouts"], prompts=prompts, **{k: getattr(batch.rollouts, k) for k in _KEPT})
    new = {"rollouts": rollouts, "keep": batch.rows, "outcome": batch.outcome, "advantage": batch.advantage}
    return {"window": means, "count": memory["count"] + some, **new}


def look_back(
    memory: Memory, key: Array, models: Any, batch: Batch, learn: Learn, *, start: int, negative: Any, minibatches: int
) -> tuple[Any, Memory]:
    """One more update on the batch before, if this one tells that its update was right or wrong; then the usual one."""
    first, second = jax.random.split(key)
    xi = improvement(masked_mean(row_reward(batch), batch.rows), memory["window"], memory["count"])
    sign = jnp.where(xi >= 0, 1.0, negative)
    active = (memory["count"] >= start) & (sign * xi != 0) & batch.rows.any() & memory["keep"].any()
    update = partial(several_passes, minibatches=minibatches)

    def again(models: Any) -> Any:
        old = replace(learn.batch(models, replace(memory["rollouts"], outcome=memory["outcome"])), keep=memory["keep"])
        credit = jnp.clip(jax.vmap(of_size_one)(memory["advantage"], old.mask) * xi, -10.0, 10.0)
        return update(first, models, replace(old, advantage=sign * credit), learn)[0]

    models = jax.lax.cond(active, again, lambda models: models, models)
    models, metrics = update(second, models, batch, learn)
    found = {"improvement": xi, "looked_back": active.astype(jnp.float32)}
    return (models, {**metrics, **found}), remembered(memory, batch)


def pipo(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float | None = None,
    window: int = 8,
    start: int = 8,
    negative: float = 0.1,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` that looks back: if rewards are above those of recent steps, the last update is reinforced, else undone.

    `xi`, how far the mean reward is from those of the last steps, in their standard deviations, multiplies the last
    batch's advantages in one more update on it, before the usual one. A step costs up to half as much again.

    Source: "Policy Improvement Reinforcement Learning", 2604.00860.
    Deviations: the window is of the steps before (in the released code also of this one, twice); the look back clips as
      PPO does (there: from above only); with `xi = 0` no optimiser step is taken. The critic's variant is not here.
    Limit: before `start` means are known it is `grpo` with `token_mean` and the same divergence.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip: both widths.  # not in the paper
      kl: weight of the divergence in both updates.  # None: not in the paper, there as in the method it is added to
      window: K, means that a step is compared with.
      start: means there must be before the first look back.
      negative: lambda, how much a worse step undoes; 0.1 in the paper, 0 (nothing) in the released code.
      minibatches: optimiser steps of both updates.  # not in the paper
    """
    if window < 1:
        raise ValueError(f"pipo compares with the means of at least one step: window must be positive, got {window}")
    parent = grpo(group_size=group_size, clip=clip, kl=kl)
    step = partial(look_back, start=start, negative=negative, minibatches=minibatches)
    update = Stage(init=partial(nothing_yet, size=group_size, window=window), apply=step)
    return replace(parent, loss=replace(parent.loss, aggregate=token_mean), update=update)  # type: ignore[type-var]
