"""SPO-tree: credit for the edges of a tree of responses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.spo_chain import spo_chain
from jaxrl_llm.rollouts.resume import buffer
from jaxrl_llm.rollouts.tree import Gain, Shape, edge_credit, edge_exists, edge_rows, edge_values, sample_tree
from jaxrl_llm.types import Problem, Prompts, Rollouts, Stage, World, masked, split

Trees = dict[str, Any]


def no_trees(problem: Problem, *, shape: Shape, age: int) -> Trees:
    """Room for the trees of `age - 1` steps: their leaves, their edges' values and credit, and which edges are left."""
    if age == 1:
        return {}
    trees = (age - 1) * problem.prompts
    leaves = buffer(problem, groups=trees, size=shape.leaves)
    leaves = replace(leaves, segment=jnp.zeros(leaves.tokens.shape, jnp.int32))
    edges = (trees, shape.edges)  # separate arrays: each is donated
    return {"leaves": leaves, "value": jnp.zeros(edges), "credit": jnp.zeros(edges), "left": jnp.zeros(edges, bool)}


def new_trees(world: World, key: Array, prompts: Prompts, *, shape: Shape, gain: Gain) -> tuple[Trees, Array]:
    """The prompts' trees, whose edges with credit are all left, and `[B]` tokens sampled."""
    leaves = sample_tree(world, key, prompts, shape=shape)
    assert leaves.outcome is not None and leaves.generated is not None  # sample_tree wrote them
    value = jax.vmap(partial(edge_values, shape=shape))(leaves.outcome)
    credit = jax.vmap(partial(edge_credit, shape=shape, gain=gain))(value)
    trees = {"leaves": replace(leaves, outcome=None, generated=None), "credit": credit}
    left = (credit != 0) & edge_exists(leaves, shape=shape)
    return {**trees, "value": masked(~jnp.isnan(value), value), "left": left}, leaves.generated


def draw(key: Array, trees: Trees, count: int) -> tuple[Array, Array, Trees]:
    """`[N count]` random edges of each tree, which of them were left, and the trees without them."""
    left = trees["left"]
    order, edges = jax.lax.top_k(jnp.where(left, jax.random.uniform(key, left.shape), -1.0), count)
    used = jnp.zeros_like(left).at[jnp.arange(len(left))[:, None], edges].set(True)
    return edges, order >= 0, {**trees, "left": left & ~used}


def grow_and_draw(
    memory: Trees, key: Array, world: World, prompts: Prompts, *, shape: Shape, edges: int, gain: Gain
) -> tuple[Rollouts, Trees]:
    """New trees, and at most `edges` edges of each tree there is; an edge is drawn once, and only if it has credit."""
    keys = split(key, "sample", "draw")
    new, sampled = new_trees(world, keys["sample"], prompts, shape=shape, gain=gain)
    trees = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), new, memory) if memory else new
    chosen, there, left = draw(keys["draw"], trees, min(edges, shape.edges))
    rows = edge_rows(trees["leaves"], chosen, shape=shape)
    gained, worth = (jnp.take_along_axis(trees[name], chosen, -1) for name in ("credit", "value"))
    rows = replace(rows, mask=rows.mask & there[..., None], outcome=worth)
    rows = replace(rows, credit=jnp.broadcast_to(gained[..., None], rows.mask.shape))
    rows = replace(rows, generated=jnp.zeros(len(chosen)).at[: len(sampled)].set(sampled))
    places = jnp.arange(len(chosen) - len(sampled))
    return rows, jax.tree.map(lambda x: x[places], left) if memory else memory


def spo_tree(
    *,
    branch: tuple[int, ...] = (6, 6, 6),
    segment: int = 30,
    edges: int = 32,
    age: int = 8,
    gain: Gain = center,
    threshold: float = 0.9,
    clip: float = 0.2,
    kl: float | None = 1e-4,
    whitened: bool = True,
    minibatches: int = 1,
) -> Algorithm:
    """`spo_chain` whose values come from a tree: a state is worth the mean outcome of the leaves after it.

    The unit of training is an edge, a segment after what led to it. A tree has more edges than a step needs: those not
    drawn wait for the next steps, with the log-probs they were sampled under.

    Source: "Segment Policy Optimization", 2505.23564, SPO-tree, and its released code.
    Deviations: as `spo_chain`. A step holds the groups of `age` steps, the first of which are new.
    Limit: branch=(G,) and age=1 is `spo_chain` of groups of G with one segment a row, valued by the group's mean.
    Family: credit.

    Args:
      branch: children of a node at each depth.
      segment: tokens of an edge, but for the last ones, which have no bound; 30 for short responses, 600 for long.
      edges: of a tree, at most, in a step.
      age: steps in which the edges of a tree may be drawn.
      gain: of each child among its siblings; `center` is what its value is above its parent's, and
        `partial(center_scale, ddof=0, eps=1e-8)` the other mode of the released code.
      threshold: unsure means a probability below it.
      clip: both widths.
      kl: weight of the divergence, summed over the unsure tokens of an edge; None or 0 drops the reference.
      whitened: normalise over the unsure tokens of the batch, as the released code does and the equations do not.
      minibatches: optimiser steps a batch.  # 8 in the released code

    Raises:
      ValueError: a size below 1.
    """
    if age < 1 or edges < 1:
        raise ValueError(f"spo_tree: age and edges must be at least 1, got {age} and {edges}")
    shape = Shape(branch=branch, segment=segment)
    parent = spo_chain(threshold=threshold, clip=clip, kl=kl, whitened=whitened, minibatches=minibatches)
    grow = partial(grow_and_draw, shape=shape, edges=edges, gain=gain)
    return replace(parent, rollout=Stage(init=partial(no_trees, shape=shape, age=age), apply=grow))
