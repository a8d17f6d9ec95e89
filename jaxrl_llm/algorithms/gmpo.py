"""GMPO: geometric-mean policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.ratio import log_ratio
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.types import Batch, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def geometric_ratio(scores: Scores, batch: Batch, *, width: float | Array = 0.4) -> Array:
    """`exp(mean_t D_t)`, every `D_t` clipped on the side its advantage pushes to: at `width`, or at `-width` if A < 0.

    Raises:
      ValueError: no advantage was computed.
    """
    if batch.advantage is None:
        raise ValueError("geometric_ratio needs batch.advantage: it clips by its sign")
    difference, up = log_ratio(scores, batch), batch.advantage > 0
    near = jnp.where(up, jnp.minimum(difference, width), jnp.maximum(difference, -width))
    near = masked(batch.mask, near)
    mean = near.sum(-1, keepdims=True) / jnp.maximum(batch.mask.sum(-1, keepdims=True), 1)
    return jnp.broadcast_to(jnp.exp(mean), near.shape)


def gmpo(*, group_size: int = 8, width: float = 0.4, minibatches: int = 8) -> Algorithm:
    """`gspo` that clips each token's log-ratio before their mean, not the mean: one wild token cannot silence a row.

    Source: "Geometric-Mean Policy Optimization", 2507.20673, eq. 4 and algorithm 1; settings of section 4.1.
    Deviations: none known. The row's gradient reaches only its tokens that are not clipped, as in algorithm 1.
    Limit: with responses of one token it is `grpo` with kl=None and the bounds `exp(-width)` and `exp(width)`.
    Family: objective and clipping.

    Args:
      group_size: responses a prompt.
      width: of a token's log-ratio, on the side the advantage pushes to; above 0.
      minibatches: optimiser steps a batch; the prompts must divide into them.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            ratio=partial(geometric_ratio, width=width), surrogate=unclipped, aggregate=sequence_mean_token_mean
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
