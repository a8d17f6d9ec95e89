"""Responses of earlier steps, learnt from again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import INJECTED, PADDING, POLICY, Batch, Memory, Problem, Prompts, Rollouts, Stage, World, split


def with_replay(
    sample: Callable[..., Rollouts], *, size: int, keep: int, chance: float | Array = 0.5
) -> Callable[..., Rollouts] | Stage:
    """`sample`, or with probability `chance` (for each prompt) `size` of the prompt's own last `keep` responses.

    Memory: `[P keep T]` tokens, which for long responses and many prompts is large. A prompt is replayed once it has
    `size` responses; they are drawn without replacement, and nothing is sampled in their place. Replayed tokens have
    the role INJECTED: their behaviour log-probs are not known. The verifier is asked again.

    Args:
      sample: `(world, key, prompts, size=, limit=) -> Rollouts`.
      size: G.
      keep: the last responses of each prompt that are remembered; 0 for none, which gives `sample` itself.
      chance: of a prompt to be replayed.

    Raises:
      ValueError: `keep` is negative, or less than `size` but not 0.
    """
    if keep and keep < size:
        raise ValueError(f"with_replay: keep must be 0 or at least the group size {size}, got {keep}")
    if not keep:
        return functools.partial(sample, size=size)
    return Stage(
        init=functools.partial(_empty, keep=keep),
        apply=functools.partial(_sample_or_replay, sample=sample, size=size, chance=chance),
        observe=_remember,
    )


def _empty(problem: Problem, *, keep: int) -> dict[str, Array]:
    shape = (problem.rows, keep, problem.length)
    return {
        "tokens": jnp.zeros(shape, jnp.int32),
        "mask": jnp.zeros(shape, bool),
        "truncated": jnp.zeros(shape[:2], bool),
        "written": jnp.zeros(problem.rows, jnp.int32),
    }


def _sample_or_replay(
    memory: dict[str, Array],
    key: Array,
    world: World,
    prompts: Prompts,
    *,
    sample: Callable[..., Rollouts],
    size: int,
    chance: float | Array,
) -> tuple[Rollouts, Memory]:
    keys, index = split(key, "again", "which", "sample"), prompts.index
    keep = memory["tokens"].shape[1]
    stored = jnp.minimum(memory["written"][index], keep)[:, None]
    again = (stored >= size) & jax.random.bernoulli(keys["again"], chance, stored.shape)  # [B 1]
    order = jnp.where(jnp.arange(keep) < stored, jax.random.uniform(keys["which"], (index.shape[0], keep)), -1.0)
    _, chosen = jax.lax.top_k(order, size)
    old = {name: memory[name][index[:, None], chosen] for name in ("tokens", "mask", "truncated")}

    limit = jnp.where(again, 0, jnp.full((index.shape[0], size), world.length, jnp.int32))
    fresh = sample(world, keys["sample"], prompts, size=size, limit=limit)
    row = again[..., None]
    return dataclasses.replace(
        fresh,
        tokens=jnp.where(row, old["tokens"], fresh.tokens),
        mask=jnp.where(row, old["mask"], fresh.mask),
        role=jnp.where(row, jnp.where(old["mask"], INJECTED, PADDING), fresh.role).astype(jnp.int8),
        truncated=jnp.where(again, old["truncated"], fresh.truncated),
    ), memory


def _remember(memory: dict[str, Array], batch: Batch) -> dict[str, Array]:
    """Writes the new rows that count, each to the place after the last one of its prompt, in a circle."""
    rollouts, index, keep = batch.rollouts, batch.prompts.index, memory["tokens"].shape[1]
    new = batch.rows & (rollouts.role == POLICY).any(-1)
    # The same prompt may stand in the batch more than once.
    same = jnp.tril(index[:, None] == index, k=-1)
    before = (same * new.sum(-1)).sum(-1, keepdims=True) + jnp.cumsum(new, -1) - new
    place = jnp.where(new & (before < keep), (memory["written"][index][:, None] + before) % keep, keep)
    where = (index[:, None], place)
    rows: dict[str, Any] = {"tokens": rollouts.tokens, "mask": rollouts.mask, "truncated": rollouts.truncated}
    kept = {name: memory[name].at[where].set(x, mode="drop") for name, x in rows.items()}
    added = jnp.where(new & (before < keep), 1, 0).sum(-1)
    return {**kept, "written": memory["written"].at[index].add(added)}
