"""Importance ratios of the current policy to the one the advantage was estimated under."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Scores, masked

Old = Callable[[Batch], Array]


def behaviour(batch: Batch) -> Array:
    """`[B G T]`: log-probs the sampler recorded. Free; in f32 equal to recomputed ones within 1e-5."""
    return batch.rollouts.logp


def recomputed(batch: Batch) -> Array:
    """`[B G T]`: log-probs of the policy before the update, scored again by the trainer; costs one forward pass.

    Raises:
      ValueError: they were not computed.
    """
    if batch.old is None or batch.old.logp is None:
        raise ValueError("recomputed log-probs were not computed: the engine adds batch.old for recipes that read it")
    return batch.old.logp


def log_ratio(scores: Scores, batch: Batch, *, old: Old = behaviour) -> Array:
    """`D = l - l_old`, `[B G T]`, 0 where masked, clamped to +-20 so that its exponential is finite.

    Raises:
      ValueError: `scores.logp` was not computed.
    """
    if scores.logp is None:
        raise ValueError("an importance ratio needs scores.logp")
    return jnp.clip(masked(batch.mask, scores.logp - jax.lax.stop_gradient(old(batch))), -20.0, 20.0)


def token_ratio(scores: Scores, batch: Batch, *, old: Old = behaviour) -> Array:
    """`r_t = exp(l_t - l_old,t)`, `[B G T]` (PPO, 1707.06347)."""
    return jnp.exp(log_ratio(scores, batch, old=old))


def sequence_ratio(scores: Scores, batch: Batch, *, old: Old = behaviour) -> Array:
    """`s = exp(mean_t D_t)` at every token of its row, `[B G T]` (GSPO, 2507.18071, eq. 7).

    The log of `s` is clamped at 10, as in verl.
    """
    difference = log_ratio(scores, batch, old=old)
    mean = difference.sum(-1, keepdims=True) / jnp.maximum(batch.mask.sum(-1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.exp(jnp.minimum(mean, 10.0)), difference.shape)


def sequence_ratio_per_token(scores: Scores, batch: Batch, *, old: Old = behaviour) -> Array:
    """`sg[s] * exp(l - sg[l])`: the value of `sequence_ratio`, each token's own gradient (GSPO-token, eq. 14)."""
    difference = log_ratio(scores, batch, old=old)
    own = jnp.exp(difference - jax.lax.stop_gradient(difference))
    return jax.lax.stop_gradient(sequence_ratio(scores, batch, old=old)) * own
