"""HAPO: history-aware policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.types import Batch, Problem, Stage, masked

History = dict[str, Array]  # tokens of right responses to each prompt, and how many there were: [P]
Shape = Callable[[Array, Array, Array], Array]


def cosine(length: Array, past: Array, right: Array) -> Array:
    """`cos(pi/2 * n / h)`, -1 from `2 h` on; at least -0.7 if right, at most 0 if wrong."""
    value = jnp.where(length < 2 * past, jnp.cos(jnp.pi / 2 * length / past), -1.0)
    return jnp.where(right, jnp.maximum(value, -0.7), jnp.minimum(value, 0.0))


def linear(length: Array, past: Array, right: Array, *, tolerance: float | Array = 0.1) -> Array:
    """`1 - n / h` for right rows below `h`, 0 up to `(1 + tolerance) h`, then falling to -0.7; to -1 if wrong."""
    late = jnp.minimum(((1 + tolerance) * past - length) / past, 0.0)
    early = jnp.maximum(1 - length / past, 0.0)
    return jnp.where(right, jnp.maximum(early + late, -0.7), jnp.maximum(late, -1.0))


def with_length(
    memory: History, key: Array, batch: Batch, *, weight: float | Array, shape: Shape, threshold: float | Array = 0.5
) -> tuple[Array, History]:
    """`[B G]`: the outcome plus `weight * shape`, which is 0 for prompts that were never solved."""
    past, count = (memory[name][batch.prompts.index][:, None] for name in ("length", "count"))
    length = batch.rollouts.lengths.astype(jnp.float32)
    value = shape(length, jnp.where(count > 0, past, 1.0), batch.outcome > threshold)
    return batch.outcome + weight * masked(count > 0, value), memory


def solved(batch: Batch, threshold: float | Array) -> Array:
    """`[B G]` bool: right rows, whatever a later slot selected for the loss."""
    rows = batch.rollouts.mask.any(-1) if batch.keep is None else batch.rollouts.mask.any(-1) & batch.keep
    return rows & (batch.outcome > threshold)


def shortest(memory: History, batch: Batch, *, threshold: float | Array = 0.5) -> History:
    """The history with the shortest right response so far."""
    right, index = solved(batch, threshold), batch.prompts.index
    old = jnp.where(memory["count"] > 0, memory["length"], jnp.inf)
    new = old.at[index].min(jnp.where(right, batch.rollouts.lengths, jnp.inf).min(-1))
    return {"length": masked(jnp.isfinite(new), new), "count": memory["count"].at[index].add(right.sum(-1))}


def average(memory: History, batch: Batch, *, threshold: float | Array = 0.5) -> History:
    """The history with the mean length of all right responses so far."""
    right, index = solved(batch, threshold), batch.prompts.index
    count = memory["count"].at[index].add(right.sum(-1))
    # Deviations from the old mean, so that long runs lose no digits.
    gain = masked(right, batch.rollouts.lengths - memory["length"][index][:, None])
    change = jnp.zeros_like(count).at[index].add(gain.sum(-1))
    return {"length": memory["length"] + change / jnp.maximum(count, 1), "count": count}


def unsolved(problem: Problem) -> History:
    """No prompt was solved yet."""
    return {"length": jnp.zeros(problem.rows), "count": jnp.zeros(problem.rows)}


def hapo_history(
    *,
    group_size: int = 4,
    kl: float | None = 0.04,
    weight: float = 1.0,
    shape: Shape = cosine,
    remember: Callable[[History, Batch], History] = shortest,
) -> Algorithm:
    """`grpo` whose reward compares a response's length with the shortest right one to the same prompt so far.

    Any right response is paid more than any wrong one: at least 0.3 against at most 0.

    Source: "HAPO: Training Language Models to Reason Concisely via History-Aware Policy Optimization", 2505.11225.
    Deviations: the history changes once a step, after all rewards; in the released code each process changes its own
      within the step. No repetition penalty, which is an option there. The weight of the divergence is `grpo`'s.
    Limit: with weight=0, and for prompts that were never solved, it is `grpo`.
    Family: rewards and budgets.

    Args:
      group_size: 4 in the released code.
      kl: weight of the divergence in the loss.  # not in the paper
      weight: w, from 0 to 1.
      shape: `(length, past, right) -> [...]`: `cosine` or `linear`.
      remember: `shortest` or `average`, of the lengths in tokens of right responses.
    """
    reward = Stage(init=unsolved, apply=partial(with_length, weight=weight, shape=shape), observe=remember)
    return replace(grpo(group_size=group_size, kl=kl), reward=reward)
