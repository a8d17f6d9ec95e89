"""Importance ratios of the current policy to the one the advantage was estimated under."""

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Scores, masked


def behaviour(batch: Batch) -> Array:
    """`[B G T]`: log-probs the sampler recorded. Free; in f32 equal to recomputed ones within 1e-5."""
    return batch.rollouts.logp


def recomputed(batch: Batch) -> Array:
    """`[B G T]`: log-probs of the policy before the update, scored again by the trainer; costs one forward pass."""
    if batch.old is None or batch.old.logp is None:
        raise ValueError("recomputed log-probs were not computed: the engine adds batch.old for recipes that read it")
    return batch.old.logp


def log_ratio(scores: Scores, batch: Batch, *, old=behaviour) -> Array:
    """`D = l - l_old`, `[B G T]`, 0 where masked, clamped to +-20 so that its exponential is finite."""
    if scores.logp is None:
        raise ValueError("an importance ratio needs scores.logp")
    return jnp.clip(masked(batch.mask, scores.logp - jax.lax.stop_gradient(old(batch))), -20.0, 20.0)


def token_ratio(scores: Scores, batch: Batch, *, old=behaviour) -> Array:
    """`r_t = exp(l_t - l_old,t)`, `[B G T]` (PPO, 1707.06347)."""
    return jnp.exp(log_ratio(scores, batch, old=old))
