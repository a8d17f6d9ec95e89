"""Rewards minus one number that does not depend on the rollout's group."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.stats import centered, masked_mean
from jaxrl_llm.types import Batch, Problem, Stage


def batch_mean(batch: Batch) -> Array:
    """`R_i` minus the mean over the step's rows that count, `[B G T]`.

    Each row is part of its own baseline, which shrinks the expected gradient by `1 - 1/rows`.
    """
    return over_tokens(batch, centered(row_reward(batch), batch.rows))


def running_mean(*, decay: float = 0.9) -> Stage:
    """`R_i` minus an average of the rewards of *earlier* steps (Williams, 1992), so the gradient stays unbiased.

    A stage with memory `{"mean": [], "weight": []}`; the baseline of the first step is 0.

    Args:
      decay: how much of the average each step keeps.
    """
    return Stage(init=_no_average, apply=_minus_average, observe=functools.partial(_average, decay=decay))


def _no_average(problem: Problem) -> dict[str, Array]:
    return {"mean": jnp.zeros(()), "weight": jnp.zeros(())}


def _minus_average(memory: dict[str, Array], key: Array, batch: Batch) -> tuple[Array, Any]:
    # `weight` undoes the start at 0, as Adam's bias correction does.
    baseline = memory["mean"] / jnp.where(memory["weight"] > 0, memory["weight"], 1.0)
    return over_tokens(batch, row_reward(batch) - baseline), memory


def _average(memory: dict[str, Array], batch: Batch, *, decay: float) -> dict[str, Array]:
    new = (1 - decay) * jnp.stack([masked_mean(row_reward(batch), batch.rows), jnp.ones(())])
    mean, weight = decay * jnp.stack([memory["mean"], memory["weight"]]) + new
    some = batch.rows.any()
    return {
        "mean": jnp.where(some, mean, memory["mean"]),
        "weight": jnp.where(some, weight, memory["weight"]),
    }
