"""DaGRPO: distinctiveness-aware GRPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.rollouts.logged import logged
from jaxrl_llm.rollouts.mixed import side_by_side
from jaxrl_llm.rollouts.rows import take_rows
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import INJECTED, Batch, Prompts, Rollouts, Scores, World, masked


def sample_or_anchor(
    world: World, key: Array, prompts: Prompts, *, size: int, threshold: float | Array = 0.5
) -> Rollouts:
    """`size` samples; where none is right, the best logged response takes the place of the first, `[B size T]`."""
    own = world.sample(key, prompts, size)
    outcome, anchor = world.reward(own), logged(world, key, prompts, take=1)
    paid = jnp.zeros((outcome.shape[0], 1)) if anchor.outcome is None else anchor.outcome
    usable = anchor.mask.any(-1)[:, 0] & (paid[:, 0] > threshold)
    failed = ~(outcome > threshold).any(-1) & ~jnp.isnan(outcome).all(-1)
    rows = jnp.broadcast_to(jnp.arange(size), outcome.shape)
    rows = rows.at[:, 0].set(jnp.where(failed & usable, size, 0))
    both = replace(side_by_side(own, anchor), outcome=jnp.concatenate([outcome, paid], axis=1))
    return replace(take_rows(both, rows), generated=own.mask.sum((1, 2)).astype(jnp.float32))


def mean_logp(batch: Batch) -> Array:
    """`[B G]`: the mean of a row's log-probs under the sampler, in nats."""
    return masked_mean(batch.rollouts.logp, batch.rollouts.mask, axis=-1)


def is_distinct(quality: Array, right: Array, keep: Array, *, delta: float | Array) -> Array:
    """`[G]` bool: rows that differ by `delta` from a row with the other label; all of a group with one label."""
    other = keep[:, None] & keep & (right[:, None] != right)
    far = jnp.max(jnp.abs(quality[:, None] - quality), axis=-1, where=other, initial=0.0)
    return ~other.any(-1) | (far >= delta)


def distinctive(
    batch: Batch, *, delta: float | Array, quality: Callable[[Batch], Array], threshold: float | Array = 0.5
) -> Array:
    """`[B G]` bool: `is_distinct` in each group, all rows beside an anchor. Statistics are of what is left."""
    z = masked(batch.rows, quality(batch))
    distinct = jax.vmap(partial(is_distinct, delta=delta))(z, batch.outcome > threshold, batch.rows)
    return distinct | batch.rollouts.injected.any(-1, keepdims=True)


def ratio_of_anchors(scores: Scores, batch: Batch) -> Array:
    """`pi / sg[pi]` at injected tokens, the token ratio elsewhere, `[B G T]`.

    Raises:
      ValueError: `scores.logp` was not computed.
    """
    if scores.logp is None:
        raise ValueError("ratio_of_anchors needs scores.logp")
    foreign = batch.mask & (batch.rollouts.role == INJECTED)
    logp = masked(foreign, scores.logp)
    return jnp.where(foreign, jnp.exp(logp - jax.lax.stop_gradient(logp)), token_ratio(scores, batch))


def dagrpo(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float | None = 0.04,
    delta: float = 0.1,
    quality: Callable[[Batch], Array] = mean_logp,
    rollout: Callable[..., Rollouts] = sample_or_anchor,
) -> Algorithm:
    """`grpo` without pairs of a right and a wrong row that are nearly the same, and with an anchor where all are wrong.

    Such pairs push the same tokens up and down. A prompt nobody solves teaches nothing but by a response that came
    with the data.

    Source: "DaGRPO: Rectifying Gradient Conflict in Reasoning via Distinctiveness-Aware Group Relative Policy
      Optimization", 2512.06337.
    Deviations: approximate: only abstract and summaries were at hand, and no formula. Rows are compared by a quality
      score: the mean log-prob of a response in place of a judge's. How pairs are dropped, `delta`, and the anchors'
      ratio are a reading of the text; a group with an anchor stays whole.
    Limit: with delta=0 and rollout=sample_group it is `grpo`.
    Family: sampling and curricula.

    Args:
      group_size: rows of a group.  # not in the paper
      clip: both widths.  # not in the paper
      kl: weight of the divergence in the loss.  # not in the paper
      delta: rows must differ by this in quality from a row with the other label.  # not in the paper
      quality: `(Batch) -> [B G]`, on the scale of `delta`.  # not in the paper
      rollout: `(world, key, prompts, size=)`; `sample_group` for no anchors, which need data with responses.
    """
    parent = grpo(group_size=group_size, clip=clip, kl=kl)
    assert isinstance(parent.loss, PolicyLoss)
    return replace(
        parent,
        rollout=partial(rollout, size=group_size),
        filter=partial(distinctive, delta=delta, quality=quality),
        loss=replace(parent.loss, ratio=ratio_of_anchors),
    )
