"""COPO: consistency-aware policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.blend import Blend
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.rewards.meaning import Same, cluster_shares, clusters, same_answer
from jaxrl_llm.stats import masked_mean, standardise
from jaxrl_llm.types import Batch

Gate = Callable[[Array, Array], Array]


def answer_entropy(cluster: Array, keep: Array) -> Array:
    """`-sum_k p_k log2(p_k + 1e-8)`, `[]`, in bits: of how many rows give each answer."""
    share = cluster_shares(cluster, jnp.ones(cluster.shape), keep)
    return -jnp.sum(share * jnp.log2(share + 1e-8))


def soft(entropy: Array, advantage: Array, *, slope: float | Array = 20.0, middle: float | Array = 0.5) -> Array:
    """`sigmoid(slope (H - middle))` for every row, `[G]`."""
    return jnp.broadcast_to(jax.nn.sigmoid(slope * (entropy - middle)), advantage.shape)


def forced(entropy: Array, advantage: Array) -> Array:
    """1 for rows whose advantage in the group is not 0, `[G]`."""
    return (advantage != 0).astype(jnp.float32)


def soft_with_forced(
    entropy: Array, advantage: Array, *, slope: float | Array = 20.0, middle: float | Array = 0.5
) -> Array:
    """The product of the two, `[G]`."""
    return soft(entropy, advantage, slope=slope, middle=middle) * forced(entropy, advantage)


def local_share(batch: Batch, *, same: Same, gate: Gate) -> Array:
    """How much of a row's loss is that of its advantage in the group, `[B G]`."""
    entropy = jax.vmap(answer_entropy)(clusters(batch, same=same), batch.rows)
    return jax.vmap(gate)(entropy, jax.vmap(center_scale)(row_reward(batch), batch.rows))


def across_prompts(batch: Batch, *, same: Same, agreeing: bool) -> Array:
    """The prompt's mean reward, standardised over the prompts of the batch, for each of its rows, `[B G]`.

    Args:
      batch: all of it: a mean over some of the prompts is another.
      same: which responses give the same answer.
      agreeing: whether groups that disagree are paid less, `1 - lambda H` of it, with `lambda = (1 - 1/n) / log2 n`.
    """
    rows = batch.rows
    mean, count = masked_mean(row_reward(batch), rows, axis=-1), jnp.maximum(rows.sum(-1), 2)
    if agreeing:
        entropy = jax.vmap(answer_entropy)(clusters(batch, same=same), rows)
        mean = mean * (1 - (1 - 1 / count) / jnp.log2(count) * entropy)
    return jnp.broadcast_to(standardise(mean, rows.any(-1))[:, None], rows.shape)


def copo(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    bound: float = 3.0,
    kl: float | None = 0.001,
    gate: Gate = soft_with_forced,
    same: Same = same_answer,
    agreeing: bool = False,
) -> Algorithm:
    """`grpo` with a second advantage, of the prompt in the batch, that takes over where the group agrees.

    A group that is all right or all wrong has no advantage within it, and one that all but agrees a noisy one. There
    all rows share the prompt's: a prompt that is never solved is pushed away from what it says.

    Source: "COPO: Consistency-Aware Policy Optimization", 2508.04138, and its released code.
    Deviations: answers are compared token by token, not as parsed values.
    Limit: with the gate `forced`, where no group is all alike, it is `grpo` with `dual_clip`.
    Family: credit.

    Args:
      group_size: responses a prompt.
      clip: both widths.
      bound: of `dual_clip`.
      kl: weight of the divergence in the loss.
      gate: `(entropy [] in bits, advantage in the group [G]) -> [G]`: the share of the latter in the loss.
        `soft_with_forced`, `soft` and `forced` are the paper's.
      same: `(tokens [G T], mask [G T]) -> [G G]` bool, which responses give the same answer; equal in every token if
        not given: `partial(same_answer, marker=ids)` compares what follows a marker, with one class for those without.
      agreeing: whether the prompt's reward falls with the entropy of its answers.
    """
    loss = PolicyLoss(
        surrogate=partial(dual_clip, low=clip, high=clip, bound=bound),
        aggregate=sequence_mean_token_mean,
        terms=optional(kl_to_reference, weight=kl),
    )
    return replace(
        grpo(group_size=group_size),
        advantage=partial(across_prompts, same=same, agreeing=agreeing),
        weight=partial(local_share, same=same, gate=gate),
        loss=Blend(loss=loss, other=partial(per_group, center_scale)),
    )
