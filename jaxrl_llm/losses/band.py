"""Entropies by turn over the run, and what lies outside of a band around their mean (EPO, 2509.22576)."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.stats import segment_statistics
from jaxrl_llm.types import Batch, Memory, Problem, Scores

Number = float | Array
Band = Callable[[Array, Array, Array, Number], Array]


def outside(entropy: Array, low: Array, high: Array, penalty: Number) -> Array:
    """`penalty` unless `low < H < high`: the released form, piecewise constant and so without gradient."""
    return jnp.where((low < entropy) & (entropy < high), 0.0, penalty)


def hinge(entropy: Array, low: Array, high: Array, penalty: Number) -> Array:
    """How far `H` is outside, in nats; `penalty` plays no part."""
    return jnp.maximum(low - entropy, 0.0) + jnp.maximum(entropy - high, 0.0)


def turns_of(batch: Batch, turns: int) -> Array:
    """`[B G T]`: each token's turn, those after the last that is remembered being that one; 0 without turns."""
    turn = batch.rollouts.turn
    return jnp.zeros(batch.mask.shape, jnp.int32) if turn is None else jnp.clip(turn, 0, turns - 1)


def no_history(problem: Problem, *, turns: int) -> Memory:
    """By turn, `[K]`: the sum of its mean entropies, and the steps that had it."""
    return {"sum": jnp.zeros(turns), "steps": jnp.zeros(turns)}


def remember(memory: Memory, batch: Batch) -> Memory:
    """Each turn's mean entropy when it was sampled joins the history, if the step had that turn."""
    turns = memory["sum"].shape[0]
    found = segment_statistics(batch.rollouts.entropy, turns_of(batch, turns), batch.mask, num_segments=turns)
    return {"sum": memory["sum"] + found.mean, "steps": memory["steps"] + (found.size > 0)}


def with_history(memory: Memory, scores: Scores, batch: Batch) -> dict[str, Array]:
    """The history of each token's turn, this step's included, and whether a row came half way through the turns."""
    turns = memory["sum"].shape[0]
    turn, now = turns_of(batch, turns), remember(memory, batch)
    mean = now["sum"] / jnp.maximum(now["steps"], 1)
    half_way = (batch.mask & (turn >= turns // 2)).any()
    return {"history": mean[turn], "half_way": half_way, "share": token_mean(batch.mask)}
