"""DPH-RL: diversity-preserving hybrid RL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.advantages.sources import among_own
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.rollouts.mixed import Which, carries_logged, logged_or_sampled
from jaxrl_llm.types import Batch


def forward_kl(u: Array) -> Array:
    """`u - log u - 1`, whose mean under the base policy is `KL(base || pi)`, with `u = pi / base`."""
    return u - jnp.log(u) - 1


def jensen_shannon(u: Array) -> Array:
    """`u log u - (u + 1) log((u + 1) / 2)`: twice the Jensen-Shannon divergence."""
    return u * jnp.log(u) - (u + 1) * jnp.log((u + 1) / 2)


def alpha_divergence(u: Array, *, alpha: float | Array = 0.2) -> Array:
    """`(u^(1 - a) - (1 - a) u - a) / (a (a - 1))`."""
    return (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1))


def rehearsed(
    ratio: Array, advantage: Array, logp: Array, *, divergence: Callable[[Array], Array], bound: float | Array
) -> Array:
    """The divergence at a token that the base policy sampled, without gradient beyond `bound`; no advantage."""
    return jnp.clip(divergence(ratio), -bound, bound)


def base(batch: Batch) -> Array:
    """`[B G T]`: log-probs of the base policy, which is the reference.

    Raises:
      ValueError: they were not computed.
    """
    if batch.reference is None or batch.reference.logp is None:
        raise ValueError("dph_rl needs batch.reference.logp: train with the base policy as reference")
    return batch.reference.logp


def dph_rl(
    *,
    group_size: int = 8,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual: float = 3.0,
    weight: float = 0.05,
    divergence: Callable[[Array], Array] = forward_kl,
    bound: float = float("inf"),
    rehearse: Which = carries_logged,
) -> Algorithm:
    """`grpo` on the prompts the base policy has not mastered; on the others a mass-covering divergence from it.

    The divergence is estimated on what the base policy itself wrote, which is what makes it mass-covering: modes that
    the policy is about to lose are rehearsed. The data says which prompts those are: before training, sample the base
    policy several times a prompt, and log one right response of the prompts it got right every time. Data in which
    every prompt has a response leaves nothing to explore: say which to rehearse.

    Source: "The Choice of Divergence", 2509.07430, with the generators and the clipping of the released code.
    Deviations: the base policy is scored as the reference, its log-probs are not stored with the data. Of the two
      Jensen-Shannon forms only the one of low variance.
    Limit: where nothing is rehearsed it is `grpo` with kl=None, a dual clip and `token_mean`.
    Family: divergence and entropy.

    Args:
      group_size: samples of a prompt that is explored.
      clip_low: lower width.  # not in the paper
      clip_high: upper width.
      dual: bound of the dual clip.  # verl's
      weight: of the divergence; 0.01 to 0.05 (forward KL, alpha), 0.05 to 0.2 (Jensen-Shannon).
      divergence: `forward_kl`, `jensen_shannon` or `alpha_divergence`.
      bound: of a token's divergence; 10 in the released code, which the paper does not have.
      rehearse: `(world, prompts) -> [B]` bool.
    """
    rehearsal = PolicyLoss(
        ratio=partial(token_ratio, old=base), surrogate=partial(rehearsed, divergence=divergence, bound=bound)
    )
    explore = PolicyLoss(surrogate=partial(dual_clip, low=clip_low, high=clip_high, bound=dual), aggregate=token_mean)
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=partial(logged_or_sampled, size=group_size, which=rehearse),
        advantage=partial(among_own, advantage=partial(per_group, center_scale)),
        loss=MixedLoss(
            parts={
                "own": Part(rows=own, loss=explore),
                "rehearsal": Part(rows=injected, loss=rehearsal, weight=weight),
            }
        ),
    )
