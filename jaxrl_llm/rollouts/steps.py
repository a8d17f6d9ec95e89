"""Several steps from one state: a state is a prompt and the first steps of a response to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.resume import resume, unstarted
from jaxrl_llm.types import PADDING, Prompts, Rollouts, World, split


def begins_step(tokens: Array, exists: Array, *, ends: tuple[int, ...]) -> Array:
    """`[... T]` bool: the first token of every step, the first of all and each after one of `ends`."""
    ended = jnp.isin(tokens, jnp.array(ends, jnp.int32))
    return exists & _shifted(ended).at[..., 0].set(True)


def first_token(rollouts: Rollouts) -> Array:
    """`[B G T]` bool: the first of each run of tokens in `rollouts.mask`."""
    return rollouts.mask & ~_shifted(rollouts.mask)


def next_token(rollouts: Rollouts) -> Array:
    """`[B G T]` bool: the token after each run in `rollouts.mask`, where there is one."""
    return rollouts.attended & ~rollouts.mask & _shifted(rollouts.mask)


def sample_steps(world: World, key: Array, prompts: Prompts, *, size: int, ends: tuple[int, ...]) -> Rollouts:
    """`size` steps from one state of each prompt, and how the responses go on after them.

    The state is the beginning of any step of a first response, all as probable. Rows are whole responses, judged as
    such: the state's tokens, the row's own step, which alone `mask` counts, and the rest. A critic is asked before the
    step and after it (`valued`).

    Args:
      world: samples and judges.
      key: split.
      prompts: `[B]`.
      size: rows of a group.
      ends: token ids that end a step.

    Raises:
      ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"sample_steps: size must be at least 1, got {size}")
    keys = split(key, "solution", "state", "steps")
    solution = world.sample(keys["solution"], prompts, 1)
    begins = begins_step(solution.tokens, solution.mask, ends=ends)
    start = jnp.argmax(jnp.where(begins, jax.random.uniform(keys["state"], begins.shape), -1.0), -1)[..., None]
    places = jnp.arange(begins.shape[-1])

    names = ("tokens", "mask", "role", "logp", "entropy", "version")
    blank = {"role": PADDING}
    state: dict[str, Any] = {
        name: jnp.repeat(jnp.where(places < start, x, jnp.asarray(blank.get(name, 0), x.dtype)), size, axis=1)
        for name, x in ((name, getattr(solution, name)) for name in names)
    }
    rows = unstarted(prompts, world.sampling, size=size, length=begins.shape[-1])
    whole = resume(world, keys["steps"], dataclasses.replace(rows, **state), shared=size)

    new = whole.attended & (places >= start)
    later = begins_step(whole.tokens, whole.attended, ends=ends) & (places > start)
    step = dataclasses.replace(whole, mask=new & (jnp.cumsum(later, -1) == 0), outcome=world.reward(whole))
    generated = (solution.mask.sum((-2, -1)) + new.sum((-2, -1))).astype(jnp.float32)
    return dataclasses.replace(step, valued=first_token(step) | next_token(step), generated=generated)


def _shifted(x: Array) -> Array:
    """`x` one place later, `[... T]`."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(1, 0)])[..., :-1]
