"""An estimate of each prompt's success rate that forgets as fast as the policy moved on it (SPO, 2509.13232).

After the update of a step, the response stored for a prompt is scored again: how far its log-probs are from those it
was stored with says how much of what was seen of the prompt still holds. A rollout stage does this at the start of the
next step, where the parameters are the same ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.resume import buffer
from jaxrl_llm.stats import first, masked_mean
from jaxrl_llm.types import PADDING, POLICY, Batch, Problem, Rollouts, World

Number = float | Array
Memory = dict[str, Any]
Estimate = tuple[Array, Array]  # success rate and effective number of observations, [P]
Prior = Callable[[Problem], Estimate]


def undecided(problem: Problem) -> Estimate:
    """`Beta(1/2, 1/2)` for every prompt: no sample was seen."""
    return jnp.full(problem.rows, 0.5), jnp.ones(problem.rows)


def from_samples(problem: Problem, *, successes: Array, samples: int = 8, lowest: Number = 0.875) -> Estimate:
    """What `successes [P]` among `samples` earlier responses to each prompt say, worth `1 / (1 - lowest)` of them."""
    rate = (jnp.asarray(successes) + 0.5) / (samples + 1)
    return rate, jnp.full(problem.rows, 1 / (1 - lowest))


def empty(problem: Problem, *, prior: Prior, candidates: int) -> Memory:
    """The estimates, room for the last response to each prompt `[P T]`, and for the step not yet accounted for."""
    value, count = prior(problem)
    shape, groups = (problem.rows, problem.length), problem.prompts // candidates
    stored = {"tokens": jnp.zeros(shape, jnp.int32), "mask": jnp.zeros(shape, bool), "logp": jnp.zeros(shape)}
    last = {"rollouts": buffer(problem, groups=groups, size=1), "outcome": jnp.zeros(groups)}
    return {"value": value, "count": count, **stored, "last": {**last, "known": jnp.zeros(groups, bool)}}


def remember(memory: Memory, batch: Batch) -> Memory:
    """The memory with a step's responses, to be accounted for once the policy was updated."""
    rollouts = dataclasses.replace(batch.rollouts, credit=None, outcome=None, generated=None)
    known = rollouts.mask.any(-1) if batch.keep is None else rollouts.mask.any(-1) & batch.keep
    return {**memory, "last": {"rollouts": rollouts, "outcome": batch.outcome[:, 0], "known": known[:, 0]}}


def settled(memory: Memory, world: World, *, half: Number, lowest: Number, highest: Number) -> Memory:
    """The memory after the last step's responses, with the policy that came out of it.

    Rows of a prompt that was drawn twice count in their order; for the second one the policy has not moved.
    """
    rollouts, known = memory["last"]["rollouts"], memory["last"]["known"]
    index = rollouts.prompts.index
    old = {name: memory[name][index] for name in ("tokens", "mask", "logp")}
    moved = jnp.abs(rescored(world, rollouts, old["tokens"], old["mask"]) - old["logp"])
    drift = jnp.where(first(index, known), masked_mean(moved, old["mask"], axis=-1), 0.0)
    decay = forgetting(drift, half=half, lowest=lowest, highest=highest)
    seen = (index, memory["last"]["outcome"], decay, known)
    (value, count), _ = jax.lax.scan(observed, (memory["value"], memory["count"]), seen)

    tokens, mask = rollouts.tokens[:, 0], rollouts.mask[:, 0]
    new = {"tokens": tokens, "mask": mask, "logp": rescored(world, rollouts, tokens, mask)}
    latest = known & first(index[::-1], known[::-1])[::-1]
    place = jnp.where(latest, index, memory["value"].shape[0])  # out of bounds: writes there are dropped
    stored = {name: memory[name].at[place].set(new[name], mode="drop") for name in new}
    done = {**memory["last"], "known": jnp.zeros_like(known)}
    return {**memory, "value": value, "count": count, **stored, "last": done}


def rescored(world: World, rollouts: Rollouts, tokens: Array, mask: Array) -> Array:
    """Log-probs `[B T]` of other responses to the same prompts under the policy as it is."""
    role = jnp.where(mask, POLICY, PADDING).astype(jnp.int8)
    rows = dataclasses.replace(rollouts, tokens=tokens[:, None], mask=mask[:, None], role=role[:, None])
    logp: Array = world.score("policy", rows).logp[:, 0]  # type: ignore[index]
    return logp


def forgetting(drift: Array, *, half: Number, lowest: Number, highest: Number) -> Array:
    """`clip(2^(-D / D_half), lowest, highest)`: how much of the past is kept."""
    return jnp.clip(2.0 ** (-drift / half), lowest, highest)


def observed(estimate: Estimate, seen: tuple[Array, Array, Array, Array]) -> tuple[Estimate, None]:
    """One row: `n <- rho n + 1`, `v <- v + (R - v) / n`, the mean of a Beta whose counts fade by `rho`."""
    (value, count), (index, reward, decay, known) = estimate, seen
    n = decay * count[index] + 1
    v = value[index] + (reward - value[index]) / n
    value = value.at[index].set(jnp.where(known, v, value[index]))
    return (value, count.at[index].set(jnp.where(known, n, count[index]))), None
