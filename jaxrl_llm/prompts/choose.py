"""Which of the drawn prompts to answer: a step draws a pool and keeps some of it, as many as known when tracing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import first
from jaxrl_llm.types import Batch, Prompts


def take(prompts: Prompts, rows: Array) -> Prompts:
    """The prompts at `rows [n]`."""
    chosen: Prompts = jax.tree.map(lambda x: x[rows], prompts)
    return chosen


def kept(prompts: Prompts, candidates: int) -> int:
    """How many prompts are kept if each is chosen from `candidates`.

    Raises:
      ValueError: the drawn prompts do not divide.
    """
    drawn = prompts.index.shape[0]
    if drawn % candidates:
        raise ValueError(
            f"{drawn} prompts a step do not divide by candidates={candidates}: that many are drawn for each one kept"
        )
    return drawn // candidates


def highest(score: Array, index: Array, n: int) -> Array:
    """`[n]`: the places of the highest scores, in the order drawn; earlier ones first among equals.

    Args:
      score: `[B]`.
      index: `[B]`, rows in the data set. One that was drawn twice is not taken twice while there are others.
      n: how many.
    """
    order = jnp.lexsort((-score, ~first(index)))
    return jnp.sort(order[:n])


def successes(batch: Batch, *, threshold: float | Array = 0.5) -> tuple[Array, Array]:
    """`[B]` float32 each: a group's rows that count with an outcome above the threshold, and all that count."""
    rows = batch.rows
    return (rows & (batch.outcome > threshold)).sum(-1).astype(jnp.float32), rows.sum(-1).astype(jnp.float32)
