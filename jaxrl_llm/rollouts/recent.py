"""Groups that the policies of the last steps sampled, beside new ones."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Memory, Problem, Prompts, PyTree, Rollouts, Stage, World, split

FIELDS = ("tokens", "mask", "role", "logp", "entropy", "version", "truncated")


def sample_or_recall(*, size: int, steps: int, chance: float | Array, until: int) -> Stage:
    """For each prompt a new group, or with probability `chance` one that an earlier policy sampled for another prompt.

    Groups stay whole and keep the log-probs they were sampled with (`rollouts.logp`, `rollouts.version`), and their
    outcome: the verifier is asked once. They are drawn without replacement from the new groups of the last `steps`
    steps that could be scored; where there are too few, new ones are sampled. Memory: `[steps B G T]`, and the prompts.

    Args:
      size: G.
      steps: how far back.
      chance: of a prompt to be replaced.
      until: the step from which all groups are new.

    Raises:
      ValueError: `size` or `steps` is below 1.
    """
    if size < 1 or steps < 1:
        raise ValueError(f"sample_or_recall: size and steps must be at least 1, got {size} and {steps}")
    return Stage(
        init=functools.partial(_empty, size=size, steps=steps),
        apply=functools.partial(_sample_or_recall, size=size, steps=steps, chance=chance, until=until),
    )


def _empty(problem: Problem, *, size: int, steps: int) -> Memory:
    shape = (steps, problem.prompts, size, problem.length)
    dtypes = {"tokens": jnp.int32, "mask": bool, "role": jnp.int8, "version": jnp.int32}
    rows: dict[str, Any] = {name: jnp.zeros(shape, dtypes.get(name, jnp.float32)) for name in FIELDS}
    example = dataclasses.replace(problem.example, logged=None)
    return {
        "rows": {**rows, "truncated": jnp.zeros(shape[:3], bool), "outcome": jnp.zeros(shape[:3])},
        "prompts": jax.tree.map(lambda x: jnp.zeros((steps, *x.shape), x.dtype), example),
        "new": jnp.zeros(shape[:2], bool),
    }


def _sample_or_recall(
    memory: Memory, key: Array, world: World, prompts: Prompts, *, size: int, steps: int, chance: Any, until: int
) -> tuple[Rollouts, Memory]:
    keys, b = split(key, "which", "order", "sample"), prompts.index.shape[0]
    prompts = dataclasses.replace(prompts, logged=None)
    wanted = jax.random.bernoulli(keys["which"], chance, (b,)) & (world.step < until)
    # The pool in random order, groups that are there first.
    pool = memory["new"].ravel()
    order = jnp.argsort(jnp.where(pool, jax.random.uniform(keys["order"], pool.shape), 2.0))
    rank = jnp.cumsum(wanted) - 1
    again = wanted & (rank < pool.sum())
    chosen = order[jnp.clip(rank, 0, pool.size - 1)]

    limit = jnp.where(again[:, None], 0, jnp.full((b, size), world.length, jnp.int32))
    fresh = world.sample(keys["sample"], prompts, size, limit=limit)
    outcome = world.reward(fresh)
    new = {"rows": {**{name: getattr(fresh, name) for name in FIELDS}, "outcome": outcome}, "prompts": prompts}

    def either(old: Array, x: Array) -> Array:
        recalled = old.reshape(-1, *old.shape[2:])[chosen]
        return jnp.where(again.reshape(-1, *[1] * (x.ndim - 1)), recalled, x)

    merged = jax.tree.map(either, {name: memory[name] for name in new}, new)
    kept = _remember(memory, new, world.step % steps, ~again & jnp.isfinite(outcome).all(-1))
    context = jax.tree.map(lambda x: x[:, None], merged["prompts"].context)
    rollouts = dataclasses.replace(fresh, **merged["rows"], prompts=merged["prompts"], context=context)
    return dataclasses.replace(rollouts, generated=fresh.mask.sum((1, 2)).astype(jnp.float32)), kept


def _remember(memory: Memory, new: PyTree, here: Array, kept: Array) -> Memory:
    """Writes the groups where `kept`, `[B]`, to the place of this step."""
    where = here, jnp.where(kept, jnp.arange(kept.size), kept.size)
    written: Memory = jax.tree.map(
        lambda old, x: old.at[where].set(x, mode="drop"), {name: memory[name] for name in new}, new
    )
    fresh = memory["new"].at[here].set(False).at[where].set(True, mode="drop")
    return {**written, "new": fresh}
