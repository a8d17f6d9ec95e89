"""DisCO: discriminative constrained optimisation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import raw
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.losses.aggregate import group_mean_token_mean
from jaxrl_llm.losses.group import GroupLoss, sequence_logp
from jaxrl_llm.losses.ratio import log_ratio, token_ratio
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.types import Batch, Metrics, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def average_logp(scores: Scores, batch: Batch) -> Array:
    """`mean_t l`, `[B G]`."""
    return sequence_logp(scores, batch) / jnp.maximum(batch.mask.sum(-1), 1)


def average_ratio(scores: Scores, batch: Batch) -> Array:
    """`mean_t r`, `[B G]`."""
    return masked(batch.mask, token_ratio(scores, batch)).sum(-1) / jnp.maximum(batch.mask.sum(-1), 1)


def average(score: Array, rows: Array) -> Array:
    """The mean score of the rows, `[G] -> []` (DisCO-b)."""
    return masked(rows, score).sum() / jnp.maximum(rows.sum(), 1)


def soft_maximum(score: Array, rows: Array, *, tau: float | Array) -> Array:
    """`tau * log mean exp(s / tau)` of the rows, `[G] -> []`: the likeliest mistakes weigh most."""
    top = jax.lax.stop_gradient(masked(rows.any(), jnp.max(score, where=rows, initial=-jnp.inf)))
    # From the maximum, and without the 1 of the exponential: a large tau must not cancel.
    growth = masked(rows, jnp.expm1(masked(rows, score - top) / tau)).sum() / jnp.maximum(rows.sum(), 1)
    return top + tau * jnp.log1p(growth)


def discriminate(score: Array, reward: Array, rows: Array, *, of_wrong: Callable[[Array, Array], Array]) -> Array:
    """Minus how much higher the correct rows of a group score than the wrong ones; 0 unless it has both."""
    right, wrong = rows & (reward > 0.5), rows & (reward <= 0.5)
    return -masked(right.any() & wrong.any(), average(score, right) - of_wrong(score, wrong))


def total_divergence(scores: Scores, batch: Batch) -> Array:
    """`sum_t (l_old - l)`, `[]`: per token an estimate of KL(old, new) on samples of the old policy."""
    return -log_ratio(scores, batch).sum()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constrained:
    """`loss + weight / 2 * max(0, D - bound)^2`, `D` the mean divergence of the step's tokens."""

    loss: GroupLoss
    weight: float | Array
    bound: float | Array

    @property
    def aggregate(self) -> Callable[[Array], Array]:
        return self.loss.aggregate

    def prepare(self, scores: Scores, batch: Batch) -> dict[str, Array]:
        """The divergence of the whole step, which no part of it knows."""
        tokens = jnp.maximum(batch.mask.sum(), 1)
        return {"divergence": total_divergence(scores, batch) / tokens, "tokens": tokens}

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss; the metric `divergence` is the constrained one. Raises ValueError if `prepare` has not run."""
        if batch.prepared is None:
            raise ValueError("Constrained needs batch.prepared; run it through the engine")
        value, metrics = self.loss(scores, batch)
        whole, tokens = batch.prepared["divergence"], batch.prepared["tokens"]
        here, part = total_divergence(scores, batch) / tokens, batch.mask.sum() / tokens
        excess = jnp.maximum(whole - self.bound, 0.0)
        # In parts that add up: the slope goes through `here`, the value is this part's of the whole step's.
        penalty = self.weight * excess * (here - jax.lax.stop_gradient(here) + part * excess / 2)
        return value + penalty, {**metrics, "divergence": jax.lax.stop_gradient(here)}


def disco(
    *,
    group_size: int = 8,
    score: Callable[[Scores, Batch], Array] = average_logp,
    tau: float | None = 10.0,
    bound: float = 1e-4,
    penalty: float = 1e3,
    minibatches: int = 4,
) -> Algorithm:
    """Correct answers are to score above wrong ones, with a hard limit on divergence: no advantage, ratio or clip.

    Source: "DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained Optimization", 2505.12366.
    Deviations: the value of the loss is the objective's (the released code has its gradient only).
    Limit: as tau grows it tends to DisCO-b, tau=None: within the bound that is REINFORCE with advantages
      `G / (correct rows)` and `-G / (wrong rows)` and a mean over rows of means over tokens.
    Family: objective and clipping.

    Args:
      group_size: 8 in the paper.
      score: `average_logp` (log L) or `average_ratio` (L-ratio).
      tau: below it differences of score make the likeliest mistakes weigh more: 10 with `average_logp`, 1 with
        `average_ratio` in the paper; None weighs all alike (DisCO-b).
      bound: delta, nats a token.
      penalty: beta_0, of the squared excess.
      minibatches: optimiser steps a batch; the bound acts from the second on.
    """
    of_wrong = average if tau is None else partial(soft_maximum, tau=tau)
    group = GroupLoss(objective=partial(discriminate, of_wrong=of_wrong), score=score, aggregate=group_mean_token_mean)
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        advantage=raw,
        loss=Constrained(loss=group, weight=penalty, bound=bound),
        update=partial(several_passes, minibatches=minibatches),
    )
