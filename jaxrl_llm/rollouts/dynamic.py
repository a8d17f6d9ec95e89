"""Dynamic sampling: draw until the batch is full of informative groups, in static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import mixed
from jaxrl_llm.types import Prompts, Rollouts, World

Carry = tuple[Array, Rollouts, Array, Array]  # round, the groups so far, what each is worth, tokens sampled

# How much a slot of the buffer is worth keeping, the least first.
_INFORMATIVE, _UNINFORMATIVE, _EMPTY = range(3)


def sample_until_informative(
    world: World, key: Array, prompts: Prompts, *, size: int, rounds: int, threshold: float = 0.5
) -> Rollouts:
    """DAPO's dynamic sampling (2503.14476, section 3.2) inside one `while_loop`.

    The prompts are cut into `rounds` equal chunks. Chunks are sampled and verified one after another, and groups with
    `0 < correct < size` kept, until `B / rounds` of them are there or the prompts run out. Places left over hold
    groups that are not informative: follow with `filter=informative`, which drops them. Once the buffer is full, later
    chunks are not sampled at all (under `vmap`: by no member, once every member's buffer is full).

    Args:
      world: samples and verifies.
      key: split into one per round.
      prompts: `[B]`.
      size: G.
      rounds: at most how many chunks; 1 samples everything, so that only the filter is left of the method.
      threshold: correct means an outcome above it.

    Returns:
      `B / rounds` groups with `outcome` set and `prompts` those that were kept. A row that could not be scored (NaN) is
      neither correct nor wrong.

    Raises:
      ValueError: the prompts do not divide into `rounds`.
    """
    total = prompts.index.shape[0]
    if rounds < 1 or total % rounds:
        raise ValueError(f"sample_until_informative: {total} prompts do not divide into rounds={rounds} equal chunks")
    chunks: Prompts = jax.tree.map(lambda x: x.reshape(rounds, total // rounds, *x.shape[1:]), prompts)
    draw = functools.partial(_round, world, jax.random.split(key, rounds), chunks, size, threshold)
    shapes, _ = jax.eval_shape(draw, jnp.zeros((), jnp.int32))
    empty: Rollouts = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    start = (jnp.zeros((), jnp.int32), empty, jnp.full(total // rounds, _EMPTY), jnp.zeros(()))
    groups: Rollouts
    _, groups, _, sampled = jax.lax.while_loop(
        functools.partial(_unfinished, rounds), functools.partial(_fill, draw), start
    )
    return dataclasses.replace(groups, generated=jnp.full(total // rounds, sampled / (total // rounds)))


def _round(
    world: World, keys: Array, chunks: Prompts, size: int, threshold: float | Array, i: Array
) -> tuple[Rollouts, Array]:
    """The groups of chunk `i` and what each is worth, `[B / rounds]`."""
    rollouts = world.sample(keys[i], jax.tree.map(lambda x: x[i], chunks), size)
    outcome = world.reward(rollouts)
    scored = rollouts.mask.any(-1) & ~jnp.isnan(outcome)
    worth = jnp.where(mixed(outcome, scored, threshold=threshold), _INFORMATIVE, _UNINFORMATIVE)
    return dataclasses.replace(rollouts, outcome=outcome), worth


def _unfinished(rounds: int, carry: Carry) -> Array:
    i, _, worth, _ = carry
    return (i < rounds) & (worth != _INFORMATIVE).any()


def _fill(draw: Callable[[Array], tuple[Rollouts, Array]], carry: Carry) -> Carry:
    i, buffer, worth, sampled = carry
    drawn = draw(i)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), (buffer, worth), drawn)
    best = jnp.argsort(both[1], stable=True)[: worth.shape[0]]
    buffer, worth = jax.tree.map(lambda x: x[best], both)
    return i + 1, buffer, worth, sampled + drawn[0].mask.sum()
