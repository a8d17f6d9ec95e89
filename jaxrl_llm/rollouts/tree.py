"""Responses that share their beginnings: a tree of segments with a fixed number of branches at each depth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrl_llm.rollouts.resume import resume, unstarted
from jaxrl_llm.rollouts.rows import repeat_rows, take_rows
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import PADDING, PREFIX, Prompts, Rollouts, World

Gain = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A tree of `len(branch)` segments a response; all but the last have at most `segment` tokens.

    Its edges are numbered depth by depth, its leaves from left to right.
    """

    branch: tuple[int, ...]
    segment: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Edges at each depth."""
        return tuple(math.prod(self.branch[: i + 1]) for i in range(len(self.branch)))

    @property
    def leaves(self) -> int:
        return self.widths[-1]

    @property
    def edges(self) -> int:
        return sum(self.widths)

    @property
    def depth(self) -> np.ndarray:
        """`[edges]`, from 0."""
        return np.repeat(np.arange(len(self.branch)), self.widths)

    @property
    def leaf(self) -> np.ndarray:
        """`[edges]`: the first leaf under each edge."""
        return np.concatenate([np.arange(w) * (self.leaves // w) for w in self.widths])


def sample_tree(world: World, key: Array, prompts: Prompts, *, shape: Shape) -> Rollouts:
    """`[B leaves T]`: the rows of each prompt are the leaves of a tree; `segment` is a token's depth.

    A response that ends early ends in all the leaves it would have had. What leaves share is encoded and sampled once.

    Raises:
      ValueError: the budget leaves no token for the last segment.
    """
    depths = len(shape.branch)
    if shape.segment * (depths - 1) >= world.length:
        raise ValueError(
            f"a tree of {depths} segments of {shape.segment} tokens needs a budget of more than "
            f"{shape.segment * (depths - 1)} tokens, got {world.length}"
        )
    rows = unstarted(prompts, world.sampling, size=1, length=world.length)
    sampled = jnp.zeros(prompts.index.shape, jnp.int32)
    for i, k in enumerate(jax.random.split(key, depths)):
        begun = repeat_rows(rows, shape.branch[i])
        window = shape.segment if i + 1 < depths else None
        rows = resume(world, k, begun, window=window, shared=shape.branch[i], longest=i * shape.segment)
        sampled += (rows.attended & ~begun.attended).sum((-2, -1))
    depth = jnp.minimum(jnp.arange(world.length) // shape.segment, depths - 1)
    return dataclasses.replace(
        rows,
        segment=jnp.broadcast_to(depth, rows.tokens.shape),
        outcome=world.reward(rows),
        generated=sampled.astype(jnp.float32),
    )


def edge_values(outcome: Array, *, shape: Shape) -> Array:
    """`[edges]`: the mean outcome of the leaves `[leaves]` under each edge; NaN if none could be scored."""
    known = ~jnp.isnan(outcome)
    return jnp.concatenate([_mean(outcome.reshape(w, -1), known.reshape(w, -1)) for w in shape.widths])


def edge_credit(values: Array, *, shape: Shape, gain: Gain) -> Array:
    """`[edges]`: `gain(values, known)` among the edges with one parent; 0 for those without a value."""
    ends = np.cumsum(shape.widths)[:-1]
    families = [v.reshape(-1, b) for v, b in zip(jnp.split(values, ends), shape.branch, strict=True)]
    return jnp.concatenate([jax.vmap(gain)(family, ~jnp.isnan(family)).ravel() for family in families])


def edge_exists(leaves: Rollouts, *, shape: Shape) -> Array:
    """`[B edges]` bool: edges with a token; those after the end of a response have none."""
    begin = np.minimum(shape.depth * shape.segment, leaves.mask.shape[-1] - 1)
    return leaves.mask[:, shape.leaf, begin]


def edge_rows(leaves: Rollouts, edges: Array, *, shape: Shape) -> Rollouts:
    """Edges `[B n]` as rows `[B n T]`: each ends with its edge, before whose tokens it has the role PREFIX."""
    depth = jnp.asarray(shape.depth)[edges][..., None]
    rows = take_rows(leaves, jnp.asarray(shape.leaf)[edges])
    assert rows.segment is not None  # sample_tree wrote it
    role = jnp.where(rows.attended & (rows.segment < depth), PREFIX, rows.role)
    role = jnp.where(rows.segment > depth, PADDING, role).astype(jnp.int8)
    return dataclasses.replace(rows, role=role, mask=rows.mask & (rows.segment == depth))


def _mean(x: Array, known: Array) -> Array:
    return jnp.where(known.any(-1), masked_mean(x, known, axis=-1), jnp.nan)
