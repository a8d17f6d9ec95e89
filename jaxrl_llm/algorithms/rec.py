"""REC: REINFORCE with clipping, and what else can stand beside the clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.gated import Gate, Weight, gated, one_sided, unweighted
from jaxrl_llm.losses.ratio import log_ratio, token_ratio
from jaxrl_llm.stats import largest, masked_mean
from jaxrl_llm.types import Batch, Memory, Scores, Stage, masked
from jaxrl_llm.updates.passes import several_passes

Credit = Callable[[Array, Array], Array]


def balanced(key: Array, reward: Array, keep: Array) -> Array:
    """Of one group `[G]` bool: no more rows below the mean than others, the surplus left out by lot."""
    good = keep & (reward >= masked_mean(reward, keep))
    bad = keep & ~good
    surplus = largest(jax.random.uniform(key, reward.shape), bad, bad.sum() - good.sum())
    return keep & ~surplus


def of_balanced(memory: Memory, key: Array, batch: Batch, *, credit: Credit) -> tuple[Array, Memory]:
    """Credit among the balanced rows, `[B G T]`; those left out have none, and stay in the denominator."""
    reward = row_reward(batch)
    keep = jax.vmap(balanced)(jax.random.split(key, reward.shape[0]), reward, batch.rows)
    return over_tokens(batch, jax.vmap(credit)(reward, keep)), memory


def squared_log_ratio(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`weight * D^2`, `[B G T]`, at every token, gated or not."""
    return weight * jnp.square(log_ratio(scores, batch))


def imitation(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`-weight * l`, `[B G T]`: the gradient of the divergence of the old policy from the current one.

    Raises:
      ValueError: log-probs were not computed.
    """
    if scores.logp is None:
        raise ValueError("imitation needs scores.logp")
    return -weight * masked(batch.mask, scores.logp)


def rec(
    *,
    group_size: int = 8,
    gate: Gate = one_sided,
    weight: Weight = unweighted,
    ratio: Callable[[Scores, Batch], Array] = token_ratio,
    aggregate: Callable[[Array], Array] = token_mean,
    credit: Credit = center,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    k2: float | None = None,
    forward_kl: float | None = None,
    balance: bool = False,
    minibatches: int = 4,
) -> Algorithm:
    """REINFORCE on groups, off-policy, with a clip to regularise it and importance weights only if wanted.

    The defaults are REC-OneSide-NoIS. `weight=importance` gives the variant with importance weights, `gate=ring` the
    ring; GSPO's is `ratio=sequence_ratio, weight=importance, aggregate=sequence_mean_token_mean`.

    Source: "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm", 2509.24203; Trinity-RFT's `rec`.
    Deviations: a group of one has advantage 0. The paper's data are up to 20 steps old; here the later mini-batches of
      a step are off-policy.
    Limit: with gate=open_gate it is REINFORCE with the same advantage and aggregation; with weight=importance its
      gradient is that of PPO's clip.
    Family: objective and clipping.

    Args:
      group_size: 8 in the paper.
      gate: of `losses.gated`: which tokens have a gradient.
      weight: of `losses.gated`: what multiplies it.
      ratio: what both see.
      aggregate: of the tokens; those gated stay in the denominator.
      credit: of one group. `partial(center_scale, ddof=0)` divides by its standard deviation.
      clip_low: lower width of the gate; 0.6 learns faster in the paper.
      clip_high: upper width; 2.0 there.
      k2: weight of the squared log-ratio; None or 0 for none.
      forward_kl: weight of imitating the old policy; None or 0 for none.
      balance: leave out bad rows, by lot, until a group has no more of them than of others.
      minibatches: optimiser steps a batch; the prompts must divide into them.  # not in the paper
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=Stage(apply=partial(of_balanced, credit=credit)) if balance else partial(per_group, credit),
        loss=PolicyLoss(
            ratio=ratio,
            surrogate=partial(gated, gate=partial(gate, low=clip_low, high=clip_high), weight=weight),
            aggregate=aggregate,
            terms=(*optional(squared_log_ratio, weight=k2), *optional(imitation, weight=forward_kl)),
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
