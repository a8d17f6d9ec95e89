"""Policy shaping: a weight for tokens that the policy did not sample, which unlikely ones keep a gradient under."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.types import INJECTED, Batch, Scores, masked


def shaped(u: Array, *, gamma: float | Array = 0.1) -> Array:
    """`f(u) = u / (u + gamma)` (LUFFY, 2504.14945); `df / d log u = f (1 - f)`, largest where `u = gamma`."""
    return u / (u + gamma)


def shaped_ratio(
    scores: Scores,
    batch: Batch,
    *,
    gamma: float | Array = 0.1,
    ratio: Callable[[Scores, Batch], Array] = token_ratio,
) -> Array:
    """`f(pi(y_t))` at injected tokens, whose sampler is taken to have been certain; `ratio` elsewhere. `[B G T]`.

    Args:
      scores: under the context the rows are learnt in.
      batch: with the tokens' roles.
      gamma: of `shaped`.
      ratio: of the tokens the policy sampled.

    Raises:
      ValueError: `scores.logp` was not computed.
    """
    if scores.logp is None:
        raise ValueError("shaped_ratio needs scores.logp")
    foreign = batch.mask & (batch.rollouts.role == INJECTED)
    logp = jnp.clip(masked(foreign, scores.logp), -20.0, 20.0)
    return jnp.where(foreign, shaped(jnp.exp(logp), gamma=gamma), ratio(scores, batch))
