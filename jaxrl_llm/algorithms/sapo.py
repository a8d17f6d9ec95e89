"""SAPO: soft adaptive policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.updates.passes import several_passes


def soft_gate(
    ratio: Array, advantage: Array, logp: Array, *, positive: float | Array = 1.0, negative: float | Array = 1.05
) -> Array:
    """`-A * 4 / tau * sigmoid(tau * (r - 1))`, tau by the sign of `A`; its slope at `r = 1` is that of `-A r`."""
    tau = jnp.where(advantage > 0, positive, negative)
    return -advantage * 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))


def sapo(*, group_size: int = 8, positive: float = 1.0, negative: float = 1.05, minibatches: int = 4) -> Algorithm:
    """`grpo` whose clip is a smooth gate: a token far from the old policy fades instead of falling silent.

    The gate is sharper for negative advantages, which spread probability over many tokens that were not sampled. No
    divergence.

    Source: "Soft Adaptive Policy Optimization", 2511.20347; as TRL's and verl's `sapo`.
    Deviations: none known. At the old policy the loss is 2 / tau times the usual one in value, not in gradient.
    Limit: at the old policy its gradient is that of REINFORCE with the same advantage and aggregation; with both
      temperatures near 0 it is that of the unclipped ratio everywhere.
    Family: objective and clipping.

    Args:
      group_size: responses a prompt.  # not in the paper
      positive: temperature of the gate where the advantage is positive, above 0.
      negative: where it is negative.
      minibatches: optimiser steps a batch; the prompts must divide into them.  # not in the paper: that of gspo
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            surrogate=partial(soft_gate, positive=positive, negative=negative), aggregate=sequence_mean_token_mean
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
