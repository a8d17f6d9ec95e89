"""TreePO: groups sampled as trees, credited against every subtree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.rollouts.forks import sample_forking
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, masked

Weigh = Callable[[Array], Array]


def equally(size: Array) -> Array:
    """1."""
    return jnp.ones(size.shape)


def by_size(size: Array) -> Array:
    """The number of rows of a subtree."""
    return size.astype(jnp.float32)


def subtree_credit(reward: Array, path: Array, there: Array, keep: Array, *, weigh: Weigh = equally) -> Array:
    """The weighted mean of what a row's reward is above the mean of each subtree it is in, `[W]`.

    The whole group is a subtree, whatever its size; others count if they have more than one row.

    Args:
      reward: `[W]`.
      path: `[W D]`, the node of the row at each depth.
      there: `[W D]` bool: the row reaches that depth.
      keep: `[W]` bool, rows that count.
      weigh: a subtree's weight by its size.
    """
    same = (path[:, None] == path) & there[:, None] & there
    same = jnp.concatenate([jnp.ones_like(same[..., :1]), same], -1) & (keep[:, None] & keep)[..., None]  # [W W 1+D]
    size = same.sum(1)
    used = (size > 1).at[:, 0].set(keep)
    above = masked(keep, reward)[:, None] - masked_mean(masked(keep, reward)[:, None], same, axis=1)
    weight = masked(used, weigh(size))
    return masked(used, weight * above).sum(-1) / jnp.maximum(weight.sum(-1), 1)


def per_subtree(batch: Batch, *, segment: int, weigh: Weigh = equally) -> Array:
    """`subtree_credit` of every group at each row's tokens, `[B G T]`; a rollout that does not fork has one subtree."""
    rollouts = batch.rollouts
    path = jnp.zeros(rollouts.tokens.shape, jnp.int32) if rollouts.node is None else rollouts.node
    there = rollouts.attended if rollouts.node is not None else jnp.zeros(path.shape, bool)
    credit = partial(subtree_credit, weigh=weigh)
    each = jax.vmap(credit)(row_reward(batch), path[..., ::segment], there[..., ::segment], batch.rows)
    return over_tokens(batch, each)


def treepo(
    *,
    group_size: int = 16,
    segment: int = 512,
    branch: int = 2,
    first: int = 8,
    weigh: Weigh = equally,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    limit: int | None = None,
    cache: int | None = None,
    minibatches: int = 1,
) -> Algorithm:
    """`dapo` whose groups grow as trees of segments: shared beginnings are sampled once, and tell what came of them.

    A row is compared with its group, and with the rows that share its first segment, its first two, and so on. The
    credit is then normalised over the batch's tokens.

    Source: "TreePO", 2508.17445, and its released code with the settings of its training script.
    Deviations: groups that are all right or all wrong are dropped, not replaced. Rows end at the end token and the
      budget, not at repetitions nor at a boxed answer. Rows that are begun again are taken in order, and beginnings
      that rows share are encoded again at each segment (but sampled once). No dual clip.
    Limit: rows that share nothing make `reinforce_pp_baseline` with the clip, rewards and filter of `dapo`.
    Family: credit.

    Args:
      group_size: finished responses a prompt.
      segment: tokens after which rows may fork.
      branch: of a row that goes on, while the group has room.
      first: the most branches of a prompt; their number is random, from `branch` on.
      weigh: of a row's subtrees by their size: `equally`, as in the training script, or `by_size`.
      clip_low: lower width.
      clip_high: upper width.
      limit: as in `dapo`.
      cache: as in `dapo`; 512 in the released code.
      minibatches: optimiser steps a batch; 16 in the released code.  # 1: as in `dapo`

    Raises:
      ValueError: a size below 1, or `branch <= first <= group_size` does not hold.
    """
    if segment < 1 or not 1 <= branch <= first <= group_size:
        raise ValueError(
            f"treepo: segment must be at least 1 and 1 <= branch <= first <= group_size, got segment={segment}, "
            f"branch={branch}, first={first}, group_size={group_size}"
        )
    parent = dapo(clip_low=clip_low, clip_high=clip_high, limit=limit, cache=cache, minibatches=minibatches)
    sample = partial(sample_forking, size=group_size, segment=segment, branch=branch, first=first)
    return replace(parent, rollout=sample, advantage=chain(partial(per_subtree, segment=segment, weigh=weigh), whiten))
