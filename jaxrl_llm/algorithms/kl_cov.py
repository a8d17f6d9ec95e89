"""KL-Cov: a divergence on the tokens whose log-prob and advantage covary most."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.covariance import at_least_one, covariance
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.stats import largest
from jaxrl_llm.types import Batch, Scores, masked


def most_covariant(scores: Scores, batch: Batch, *, share: float | Array) -> dict[str, Array]:
    """`{"held": [B G T] bool}`: the `max(1, int(share * N))` tokens with the largest covariance above 0."""
    value = covariance(scores, batch)
    return {"held": largest(value, batch.mask & (value > 0), at_least_one(share, batch.mask))}


def unclipped_and_held(
    ratio: Array, advantage: Array, logp: Array, *, held: Array, weight: float | Array = 1.0
) -> Array:
    """`-A r`, and `weight * |log r|` more at the held tokens."""
    return -advantage * ratio + masked(held, weight * jnp.abs(jnp.log(ratio)))


def kl_cov(*, group_size: int = 8, share: float = 2e-4, weight: float = 1.0, minibatches: int = 4) -> Algorithm:
    """`dapo` without clip that holds back the few tokens that make entropy fall: those of largest covariance.

    Source: "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models", 2505.22617 (KL-Cov).
    Deviations: a token whose covariance is not positive is never held, so a batch without credit changes nothing (the
      released code holds some token of it); no length punishment. The old log-probs are the sampler's: on-policy, where
      `|log r|` has its kink, the sign of a held token's divergence is that of rounding.
    Limit: with weight=0 it is the unclipped importance-weighted loss.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.  # not in the paper
      share: of the step's tokens; 2e-4 for 32B, 2e-3 for 7B.
      weight: of the divergence.
      minibatches: optimiser steps a batch: in the first one there is no divergence yet.  # not in the paper
    """
    return replace(
        dapo(group_size=group_size, minibatches=minibatches),
        reward=verified,
        loss=PolicyLoss(
            surrogate=partial(unclipped_and_held, weight=weight),
            aggregate=token_mean,
            prepare=partial(most_covariant, share=share),
        ),
    )
