"""VAPO: value-based augmented proximal policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.gae import sequence_gae
from jaxrl_llm.advantages.returns import token_rewards
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, chain, optional
from jaxrl_llm.algorithms.vc_ppo import vc_ppo
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.together import Together, correct_tokens
from jaxrl_llm.types import Batch, Scores, masked


def adaptive_lam(length: Array, *, alpha: float = 0.05, floor: float = 0.0) -> Array:
    """`1 - 1 / (alpha * length)`, so that the sum of its powers is `alpha * length`; at least `floor`."""
    return jnp.maximum(1 - 1 / (alpha * jnp.maximum(length, 1)), floor)


def adaptive_gae(batch: Batch, *, gamma: float = 1.0, alpha: float = 0.05, floor: float = 0.0) -> Array:
    """`gae` with a lambda for each row, `adaptive_lam` of its tokens, `[B G T]`.

    Raises:
      ValueError: there is no critic, or the reward slot has not run.
    """
    if batch.value is None:
        raise ValueError("adaptive_gae needs batch.value: train with a critic (the engine adds it)")

    def row(reward: Array, value: Array, mask: Array) -> Array:
        lam = adaptive_lam(mask.sum(), alpha=alpha, floor=floor)
        return sequence_gae(reward, value, mask, gamma=gamma, lam=lam)  # type: ignore[arg-type]

    return jax.vmap(jax.vmap(row))(token_rewards(batch), batch.value, batch.mask)


def weighted_nll(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`-weight * l`, `[B G T]`.

    Raises:
      ValueError: the log-probs were not computed.
    """
    if scores.logp is None:
        raise ValueError("weighted_nll needs scores.logp; run it through the engine")
    return -weight * masked(batch.mask, scores.logp)


def vapo(
    *,
    group_size: int = 16,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    gamma: float = 1.0,
    alpha: float = 0.05,
    floor: float = 0.0,
    imitation: float | None = 0.1,
    pretraining: int = 50,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`vc_ppo` with a lambda that grows with the response, a wider upper clip, groups, and imitation of what was right.

    Source: "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks", 2504.05118.
    Deviations: as `vc_ppo`; advantages are whitened, as there. For rows of `1 / alpha` tokens or fewer the formula's
      lambda is negative, and `floor` takes its place.
    Limit: alpha=inf is lam=1; with imitation=None and equal widths it is then `vc_ppo` with that lam.
    Family: policy gradient.

    Args:
      group_size: 16 in the paper, with 512 prompts.
      clip_low: lower width.
      clip_high: upper width.
      gamma: discount a token.
      alpha: of the adaptive lambda.
      floor: the least lambda.  # not in the paper
      imitation: mu, weight of the likelihood of correct rows, in a mean over their tokens; None or 0 for none.
      pretraining: steps in which only the critic learns.
      epochs: passes over a batch.  # as in `ppo`
      minibatches: optimiser steps a pass.  # as in `ppo`
    """
    parent = vc_ppo(group_size=group_size, gamma=gamma, pretraining=pretraining, epochs=epochs, minibatches=minibatches)
    return replace(
        parent,
        advantage=chain(partial(adaptive_gae, gamma=gamma, alpha=alpha, floor=floor), whiten),
        loss=Together(
            loss=replace(parent.loss, surrogate=partial(clip_min, low=clip_low, high=clip_high)),  # type: ignore[type-var]
            terms=optional(weighted_nll, weight=imitation),
            tokens=correct_tokens,
        ),
    )
