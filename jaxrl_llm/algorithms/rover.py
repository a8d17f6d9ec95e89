"""ROVER: random policy valuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import log_ratio, recomputed
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.stats import discounted_sum
from jaxrl_llm.types import Batch, Metrics, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def average_logp(logits: Array, tokens: Array, hidden: Array, *, temperature: float | Array = 1.0) -> Array:
    """Mean over the vocabulary of the log-probabilities, `[...]`."""
    z = jax.lax.stop_gradient(logits) / temperature
    return z.mean(-1) - jax.nn.logsumexp(z, axis=-1)


def of_uniform_policy(scores: Scores, batch: Batch) -> Array:
    """`V_t`: the mean of `log pi - log pi_old` over all tokens the next state could choose, `[B G T]`; 0 at the end.

    Raises:
      ValueError: the measure is missing.
    """
    if batch.old is None or "average_logp" not in batch.old.extras or "average_logp" not in scores.extras:
        raise ValueError("of_uniform_policy needs the measure 'average_logp', of the policy and of the old one")
    value = masked(batch.mask, scores.extras["average_logp"] - batch.old.extras["average_logp"])
    from_here = discounted_sum(value, jnp.where(batch.mask, 0.0, 1.0))
    return jnp.pad(from_here[..., 1:], ((0, 0), (0, 0), (0, 1)))


def nothing(scores: Scores, batch: Batch) -> Array:
    """`V_t = 0`: no look ahead."""
    return jnp.zeros(batch.mask.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TemporalDifference:
    """The mean over tokens of `(scale * (l - l_old) - A - scale * sg[V_t])^2`.

    scale: from log-ratios to action values.
    following: `(Scores, Batch) -> [B G T]`: V, the value of the state after the token.
    aggregate: as `PolicyLoss.aggregate`.
    """

    scale: float | Array = 1.0
    following: Callable[[Scores, Batch], Array] = of_uniform_policy
    aggregate: Callable[[Array], Array] = token_mean

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """Raises ValueError if the share or the advantage is missing."""
        if batch.share is None or batch.advantage is None:
            raise ValueError("TemporalDifference needs batch.share and batch.advantage; run it through the engine")
        q = self.scale * log_ratio(scores, batch, old=recomputed)
        ahead = self.scale * masked(batch.mask, self.following(scores, batch))
        target = jax.lax.stop_gradient(masked(batch.mask, batch.advantage) + ahead)
        return jnp.sum(batch.share * jnp.square(q - target)), {"value": q, "target": target}


def rover(
    *,
    group_size: int = 8,
    scale: float = 1.0,
    temperature: float = 1.0,
    following: Callable[[Scores, Batch], Array] = of_uniform_policy,
    minibatches: int = 4,
) -> Algorithm:
    """The value of the uniformly random policy, learnt by temporal differences on the policy's own log-ratios.

    With one reward at the end of a tree, the softmax of those values finds every right answer, not the likeliest alone.

    Source: "Random Policy Valuation for Diverse Reasoning with Verifiable Rewards", 2509.24981, and its released code.
    Deviations: rewards are centred only, as in the paper (its mathematics script also divides by the deviation).
    Limit: at the old policy its gradient is twice that of REINFORCE with the centred reward and a token mean.
    Family: objective and clipping.

    Args:
      group_size: 8 in the paper (5 on countdown).
      scale: rho, from log-ratios to values.
      temperature: the sampler's, which a measure does not see; 0.6 in the paper.  # 1: the library's default
      following: the next state's value; `nothing` leaves it out.
      minibatches: optimiser steps a batch.
    """
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        measures={"average_logp": partial(average_logp, temperature=temperature)},
        advantage=partial(per_group, center),
        loss=TemporalDifference(scale=scale, following=following),
        update=partial(several_passes, minibatches=minibatches),
    )
