"""Entropy as a loss term."""

from __future__ import annotations

from jax import Array

from jaxrl_llm.types import Batch, Scores, masked


def entropy_bonus(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`-weight * H`, `[B G T]`, nats: a positive weight keeps the policy random.

    The gradient is that of each position's entropy, with the visited prefixes taken as given.

    Raises:
      ValueError: the entropy was not computed.
    """
    if scores.entropy is None:
        raise ValueError("entropy_bonus needs scores.entropy (the engine computes it for recipes that read it)")
    return -weight * masked(batch.mask, scores.entropy)
