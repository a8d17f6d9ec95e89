"""Losses of a policy that only samples."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.ratio import log_ratio, recomputed
from jaxrl_llm.types import Batch, Metrics, Scores, masked


def already_seen(scores: Scores, batch: Batch, *, clip: float | Array) -> tuple[Array, Metrics]:
    """The mean over tokens of `max(g, clip(g, 1 - clip, 1 + clip))`, `g = pi_behaviour / pi`: how likely the batch is.

    Minimised, it takes probability from what was sampled; a token that has lost `clip` has no gradient. The metric
    `behaviour_kl` is the mean of `g - 1 - log g` (PROPS, 2311.08290).

    Raises:
      ValueError: the engine's share or log-probs are missing.
    """
    if batch.share is None:
        raise ValueError("already_seen needs batch.share; run it through the engine")
    difference = log_ratio(scores, batch, old=recomputed)
    g = jnp.exp(difference)
    loss = masked(batch.mask, jnp.maximum(g, jnp.clip(g, 1 - clip, 1 + clip)))
    kl = masked(batch.mask, g - 1 - difference)
    return jnp.sum(batch.share * loss), {"behaviour_kl": jnp.sum(batch.share * kl)}
