"""Responses that fork as they grow: a group is a tree whose finished paths make room for more branches."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.rollouts.resume import beginnings, resume, unfinished, unstarted
from jaxrl_llm.rollouts.rows import along_group, take_rows
from jaxrl_llm.types import Prompts, Rollouts, World, split


class Forks(NamedTuple):
    """What stands in each of a group's W places next. A place without a row has source 0 and does not exist."""

    source: Array  # [W] int: the row it is a copy of
    exists: Array  # [W] bool
    going: Array  # [W] bool: copies that are to be continued; the others are finished
    again: Array  # [W] bool: those of them that go back, because nothing was going


def shares(going: Array, total: Array) -> Array:
    """`total` branches, at least as many as rows go on, over these rows, `[W]`: equally, what is left to the last."""
    count = going.sum()
    each = total // jnp.maximum(count, 1)
    last = going & (jnp.cumsum(going) == count)
    return jnp.where(going, each, 0) + jnp.where(last, total - each * count, 0)


def forks(done: Array, going: Array, ended: Array, *, branch: int) -> Forks:
    """Who goes on, and how often (TreePO, 2508.17445, the released code's `fixed_avg`).

    Rows that ended in this segment pass their branches on to those that go on. If none does and there is room, each
    finished row, in order, is begun again `branch` times.

    Args:
      done: `[W]` bool, finished rows.
      going: `[W]` bool, the others.
      ended: `[W]` bool, rows that finished in this segment.
      branch: branches of a row that goes on.
    """
    width = done.size
    room = width - done.sum()
    ahead = shares(going, jnp.minimum(room, branch * (ended.sum() + going.sum())))
    again = jnp.where(done & ~going.any(), branch, 0)  # those beyond the last place are not there
    copies = jnp.cumsum(jnp.concatenate([done, ahead, again]))
    place = jnp.arange(width)
    part = jnp.searchsorted(copies, place, side="right")
    exists = place < copies[-1]
    fresh = exists & (part >= width)
    return Forks(jnp.where(exists, part % width, 0), exists, fresh, fresh & (part >= 2 * width))


def grown(rollouts: Rollouts, active: Array, key: Array, *, segment: int, branch: int) -> tuple[Rollouts, Array]:
    """The rows after their forks, and which of them are going, `[B W]`; `active` were in the last segment.

    A row that is begun again keeps a random number of whole segments, but never its last one.
    """
    going = unfinished(rollouts)
    done = rollouts.attended.any(-1) & ~going
    next_rows = jax.vmap(functools.partial(forks, branch=branch))(done, going, done & active)
    length = rollouts.attended.sum(-1)
    segments = jnp.maximum(-(-length // segment), 1)
    kept = jnp.floor(jax.random.uniform(key, length.shape) * segments).astype(jnp.int32) * segment
    rows = take_rows(rollouts, next_rows.source)
    kept, length = along_group((kept, length), next_rows.source)
    length = jnp.where(next_rows.again, kept, jnp.where(next_rows.exists, length, 0))
    finished = rows.truncated & next_rows.exists & ~next_rows.going  # at the budget
    return beginnings(rows, length, going=next_rows.going | finished), next_rows.going


def sample_forking(
    world: World, key: Array, prompts: Prompts, *, size: int, segment: int, branch: int, first: int
) -> Rollouts:
    """Groups of `size` responses as trees; `node` tells which segment of the tree a token belongs to.

    Args:
      world: samples.
      key: consumed.
      prompts: `[B]`.
      size: W, finished responses of each.
      segment: tokens after which rows may fork.
      branch: of each row that goes on, while there is room.
      first: the most branches of a prompt; their number is random, and at least `branch`.
    """
    keys = split(key, "first", "grow")
    number = jax.random.randint(keys["first"], (prompts.index.shape[0], 1), branch, first + 1)
    start = unstarted(prompts, world.sampling, size=size, length=world.length)
    start = dataclasses.replace(start, node=jnp.zeros(start.tokens.shape, jnp.int32))
    going = jnp.arange(size) < number
    start = dataclasses.replace(start, truncated=going)

    def grow(carry: tuple[Array, Rollouts, Array, Array]) -> tuple[Array, Rollouts, Array, Array]:
        i, begun, active, sampled = carry
        now = split(jax.random.fold_in(keys["grow"], i), "sample", "fork")
        rows = resume(world, now["sample"], begun, window=segment)
        new = rows.attended & ~begun.attended
        node = jnp.where(new, i * size + jnp.arange(size)[:, None], rows.node)  # type: ignore[arg-type]
        rows = dataclasses.replace(rows, node=node)
        rows, active = grown(rows, active, now["fork"], segment=segment, branch=branch)
        return i + 1, rows, active, sampled + new.sum((-2, -1))

    carry = (jnp.int32(0), start, going, jnp.zeros(prompts.index.shape, jnp.int32))
    _, rows, _, sampled = jax.lax.while_loop(lambda carry: carry[2].any(), grow, carry)
    return dataclasses.replace(rows, generated=sampled.astype(jnp.float32))
