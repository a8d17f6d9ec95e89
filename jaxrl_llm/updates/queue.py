"""First in, first out, in a fixed number of places: a pytree of arrays `[N ...]`, and how many of them are used."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import PyTree

Queue = tuple[PyTree, Array]


def empty(items: PyTree, places: int) -> Queue:
    """Room for `places` of what looks like `items` `[n ...]` (shapes are enough)."""
    return jax.tree.map(lambda x: jnp.zeros((places, *x.shape[1:]), x.dtype), items), jnp.zeros((), jnp.int32)


def push(queue: Queue, items: PyTree, there: Array) -> Queue:
    """With the items that are `there` `[n]` behind the others; those that find no place are lost."""
    kept, used = queue
    places = jax.tree.leaves(kept)[0].shape[0]
    place = jnp.where(there, used + jnp.cumsum(there) - 1, places)  # out of bounds is dropped
    kept = jax.tree.map(lambda a, b: a.at[place].set(b, mode="drop"), kept, items)
    return kept, jnp.minimum(used + there.sum(dtype=jnp.int32), places)


def pop(queue: Queue, n: int, *, where: Array) -> tuple[Any, Queue]:
    """The `n` oldest, and the queue without them where `where` `[]`, else the queue as it is."""
    items, used = queue
    gone = jnp.where(where, n, 0)
    left: PyTree = jax.tree.map(lambda x: jnp.roll(x, -gone, axis=0), items)
    return jax.tree.map(lambda x: x[:n], items), (left, used - gone)
