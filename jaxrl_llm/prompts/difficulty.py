"""What a policy made of each prompt lately, and bins of prompts by it (GDRO, 2601.19280)."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.prompts.choose import successes
from jaxrl_llm.stats import Statistics, segment_statistics
from jaxrl_llm.types import Batch, Problem

History = dict[str, Array]


def unvisited(problem: Problem, *, window: int, bins: int) -> History:
    """Of `P` prompts: the last `window` visits, how many there were, and the bin, which is the middle one at first."""
    return {
        "passed": jnp.zeros((problem.rows, window), bool),
        "visits": jnp.zeros(problem.rows, jnp.int32),
        "bin": jnp.full(problem.rows, bins // 2, jnp.int32),
    }


def visited(history: History, batch: Batch, *, bins: int, hysteresis: float | Array) -> History:
    """The history after a step, whose prompts were visited once for every group with a row that counts.

    A visit passes if any row is correct; a prompt's estimate is the mean over its last visits. Bins are equal intervals
    of it, and a prompt leaves its own only when the estimate is beyond its edges by more than `hysteresis`.
    """
    right, rows = successes(batch)
    rows_in_data, window = history["passed"].shape
    index = jnp.where(rows > 0, batch.prompts.index, rows_in_data)  # out of bounds: writes there are dropped
    before = jnp.tril(index[:, None] == index, k=-1).sum(-1)
    place = (history["visits"][batch.prompts.index] + before) % window
    passed = history["passed"].at[index, place].set(right > 0, mode="drop")
    visits = history["visits"].at[index].add(1, mode="drop")
    known = jnp.minimum(visits, window)
    new = moved(history["bin"], passed.sum(-1), known, bins=bins, hysteresis=hysteresis)
    return {"passed": passed, "visits": visits, "bin": jnp.where(visits > history["visits"], new, history["bin"])}


def moved(bin: Array, passes: Array, visits: Array, *, bins: int, hysteresis: float | Array) -> Array:
    """The bin of an estimate `passes / visits`, or the present one while the estimate is near it. All int32 `[...]`."""
    visits = jnp.maximum(visits, 1)
    estimate = passes / visits
    left = (estimate < bin / bins - hysteresis) | (estimate > (bin + 1) / bins + hysteresis)
    return jnp.where(left, jnp.minimum(passes * bins // visits, bins - 1), bin)


def failures(bin: Array, batch: Batch, *, bins: int, threshold: float | Array = 0.5) -> Statistics:
    """Of each bin, the share of its rows that count which are not correct; `bin` `[B]` is that of each prompt."""
    failed = (batch.outcome <= threshold).astype(jnp.float32)
    ids = jnp.broadcast_to(bin[:, None], failed.shape)
    return segment_statistics(failed, ids, batch.rows, num_segments=bins)
