"""Rewards on the scale of the run so far."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.types import Batch, Problem, Stage

Moments = dict[str, Array]


def running_standard(*, eps: float = 1e-8) -> Stage:
    """`(R - mean) / (std + eps)`, `[B G]`, over all rows that counted in the run, this step's included.

    A stage with memory `{"mean", "var", "count"}` (var: biased); the std is the unbiased one. It normalises what
    earlier stages of a reward chain gave each row, the outcome if there were none. Sums are over the whole step, so
    devices agree.
    """
    return Stage(init=_nothing, apply=functools.partial(_standard, eps=eps))


def clipped(batch: Batch, *, bound: float | Array) -> Array:
    """The reward so far within `+-bound`, `[B G]`: a later stage of a reward chain."""
    reward = batch.outcome if batch.reward is None else batch.reward
    return jnp.clip(reward, -bound, bound)


def combined(memory: Moments, reward: Array, rows: Array) -> Moments:
    """The moments of two sets together (Chan et al., 1979): those remembered, and `reward` where `rows`, `[B G]`."""
    new, old = rows.sum().astype(jnp.float32), memory["count"]
    total = jnp.maximum(old + new, 1)
    mean, var = masked_mean(reward, rows), masked_var(reward, rows, ddof=0)
    gap = mean - memory["mean"]
    # Not `gap^2` times the rest: it may be too large for a float where there is nothing old.
    both = (old * memory["var"] + new * var) / total + (gap * old / total) * (gap * new / total)
    some = new > 0
    return {
        "mean": jnp.where(some, memory["mean"] + gap * new / total, memory["mean"]),
        "var": jnp.where(some, both, memory["var"]),
        "count": old + new,
    }


def _nothing(problem: Problem) -> Moments:
    return {"mean": jnp.zeros(()), "var": jnp.zeros(()), "count": jnp.zeros(())}


def _standard(memory: Moments, key: Array, batch: Batch, *, eps: float | Array) -> tuple[Array, Moments]:
    reward = batch.outcome if batch.reward is None else batch.reward
    memory = combined(memory, jax.lax.stop_gradient(reward), batch.rows)
    std = jnp.sqrt(memory["var"] * memory["count"] / jnp.maximum(memory["count"] - 1, 1))
    return (reward - memory["mean"]) / (std + eps), memory
