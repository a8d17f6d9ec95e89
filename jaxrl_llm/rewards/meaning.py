"""Which responses to a prompt say the same, and how a group is divided among what is said.

`same` is a function of one group, `(tokens [G T], mask [G T]) -> [G G]` bool: equal answers, or what a classifier says
(on the host: `jax.pure_callback`). A cluster has the number of its first row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, masked

Same = Callable[[Array, Array], Array]


def answer(tokens: Array, mask: Array, *, marker: tuple[int, ...] = ()) -> Array:
    """What a response says after the last `marker`, packed to the left, `[T]`; -1 beyond it.

    Args:
      tokens: `[T]`.
      mask: `[T]` bool.
      marker: token ids. Without it, nothing is said; if it is empty, the whole response is the answer.
    """
    places = jnp.arange(tokens.shape[0])
    text = jnp.where(places < mask.sum(), tokens[jnp.argsort(~mask, stable=True)], -1)
    if not marker:
        return text
    hit = places <= tokens.shape[0] - len(marker)
    for i, token in enumerate(marker):
        hit &= jnp.roll(text, -i) == token
    start = jnp.where(hit.any(), jnp.max(jnp.where(hit, places + len(marker), 0)), tokens.shape[0])
    return jnp.take(text, places + start, mode="fill", fill_value=-1)


def same_answer(tokens: Array, mask: Array, *, marker: tuple[int, ...] = ()) -> Array:
    """`[G G]` bool: equal `answer`s. Responses without the marker are all the same."""
    said = jax.vmap(lambda t, m: answer(t, m, marker=marker))(tokens, mask)
    return (said[:, None] == said).all(-1)


def connected(same: Array, keep: Array) -> Array:
    """The cluster of each row, `[G]` int: rows are together if a chain of pairs joins them.

    Args:
      same: `[G G]` bool; a pair is joined if either order says so.
      keep: `[G]` bool; other rows are alone, and no link of a chain.
    """
    size = same.shape[0]
    reach = (same | same.T) & keep[:, None] & keep | jnp.eye(size, dtype=bool)
    for _ in range(math.ceil(math.log2(max(size, 2)))):
        reach = reach.astype(jnp.float32) @ reach > 0
    return jnp.argmax(reach, axis=1)


def clusters(batch: Batch, *, same: Same) -> Array:
    """`[B G]` int: the cluster of each row in its group."""

    def of_group(tokens: Array, mask: Array) -> Array:
        return connected(same(tokens, mask), mask.any(-1))

    return jax.vmap(of_group)(batch.rollouts.tokens, batch.mask)


def cluster_shares(cluster: Array, weight: Array, keep: Array) -> Array:
    """Each cluster's share of the weight of the rows that count, `[G]` by cluster; 0 for numbers that no cluster has.

    Args:
      cluster: `[G]` int.
      weight: `[G]`, positive where `keep`.
      keep: `[G]` bool.
    """
    total = jax.ops.segment_sum(masked(keep, weight), cluster, num_segments=cluster.shape[0])
    return total / jnp.where(keep.any(), total.sum(), 1.0)
