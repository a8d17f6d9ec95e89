"""SEED-GRPO: semantic entropy decides how much a prompt is learnt from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.dr_grpo import dr_grpo
from jaxrl_llm.rewards.meaning import Same, cluster_shares, clusters, same_answer
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, masked

Estimator = Callable[[Array, Array, Array], Array]
Factor = Callable[[Array], Array]


def by_likelihood(logp: Array, cluster: Array, keep: Array) -> Array:
    """`p(C_k)`, `[G]`: a cluster's share of the likelihoods of a group's rows, geometric means over tokens."""
    largest = jnp.max(logp, where=keep, initial=-jnp.inf)
    return cluster_shares(cluster, jnp.exp(masked(keep, logp - largest)), keep)


def mean_surprise(logp: Array, cluster: Array, keep: Array) -> Array:
    """`-1/K sum_k log p(C_k)`, `[]`: an entropy by Monte Carlo. An unlikely cluster counts like any other."""
    share = by_likelihood(logp, cluster, keep)
    return -masked_mean(jnp.log(jnp.where(share > 0, share, 1.0)), share > 0)


def weighted_entropy(logp: Array, cluster: Array, keep: Array) -> Array:
    """`-sum_k p(C_k) log p(C_k)`, `[]`."""
    return jax.scipy.special.entr(by_likelihood(logp, cluster, keep)).sum()


def count_entropy(logp: Array, cluster: Array, keep: Array) -> Array:
    """`-sum_k n_k / n log(n_k / n)`, `[]`: of how many rows each cluster has."""
    return jax.scipy.special.entr(cluster_shares(cluster, jnp.ones_like(logp), keep)).sum()


def linear(x: Array) -> Array:
    """`1 - x`."""
    return 1 - x


def exponential(x: Array) -> Array:
    """`exp(-x)`."""
    return jnp.exp(-x)


def focal(x: Array, *, power: float | Array = 2.0) -> Array:
    """`(1 - x)^power`."""
    return (1 - x) ** power


def certainty(batch: Batch, *, same: Same, estimator: Estimator, factor: Factor, alpha: float | Array) -> Array:
    """`factor(alpha * SE / log G)` of its prompt for each row, `[B G]`, the quotient clamped to 0 ... 1."""
    logp = masked_mean(batch.rollouts.logp, batch.mask, axis=-1)
    entropy = jax.vmap(estimator)(logp, clusters(batch, same=same), batch.rows)
    largest = jnp.log(jnp.maximum(batch.rows.sum(-1), 2))
    weight = factor(alpha * jnp.clip(entropy / largest, 0.0, 1.0))
    return jnp.broadcast_to(weight[:, None], batch.rows.shape)


def seed_grpo(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    max_length: int | None = None,
    alpha: float = 0.0417,
    same: Same = same_answer,
    estimator: Estimator = mean_surprise,
    factor: Factor = linear,
) -> Algorithm:
    """`dr_grpo` that learns less from prompts where the answers disagree in meaning.

    The weight of a prompt falls with its semantic entropy, that of the clusters its responses make: where the policy
    does not know what to say, its rewards are mostly noise.

    Source: "SEED-GRPO: Semantic Entropy Enhanced GRPO", 2505.12346.
    Deviations: known in part, without code. The entropy is divided by the logarithm of the number of rows that count,
      and clamped, as the paper's estimate has no bound. A response's likelihood is normalised by its length.
    Limit: with alpha=0 it is `dr_grpo`.
    Family: credit.

    Args:
      group_size: responses a prompt; 16 in the paper's scaling table.
      clip: both widths.
      max_length: see `dr_grpo`.
      alpha: strength; with 8 responses 0.02 of the entropy in nats.  # not in the paper: of a re-implementation
      same: `(tokens [G T], mask [G T]) -> [G G]` bool, which responses mean the same; equal in every token if not
        given, which long responses never are: `partial(same_answer, marker=ids)` compares what follows a marker.
      estimator: of the entropy: `mean_surprise` (the paper's), or `weighted_entropy` or `count_entropy` (bounded).
      factor: `linear` (the paper's choice), `exponential` or `focal`.
    """
    return replace(
        dr_grpo(group_size=group_size, clip=clip, max_length=max_length),
        weight=partial(certainty, same=same, estimator=estimator, factor=factor, alpha=alpha),
    )
