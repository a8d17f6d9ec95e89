"""BuPO: bottom-up policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.types import Batch, Learn, Metrics, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def inner_logp(logits: Array, tokens: Array, hidden: Array, *, inner: Array, layer: int) -> Array:
    """Log-prob of the token by the policy that ends after `layer`, `[...]`."""
    chosen = jnp.take_along_axis(inner, tokens[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(inner, axis=-1)


def bottom_up(scores: Scores, batch: Batch, *, loss: PolicyLoss, steps: int) -> tuple[Array, Metrics]:
    """`loss`, for the first `steps` steps of the inner policy's log-probs."""
    assert scores.logp is not None  # a loss of log-probs
    logp = jnp.where(batch.step < steps, scores.extras["inner_logp"], scores.logp)
    return loss(replace(scores, logp=logp), batch)


def peek(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """No loss, and the inner policy's log-probs."""
    return jnp.zeros(()), {"inner_logp": masked(batch.mask, scores.extras["inner_logp"])}


def against_inner(
    key: Array, models: Any, batch: Batch, learn: Learn, *, steps: int, minibatches: int
) -> tuple[Any, Metrics]:
    """Passes in which, for the first `steps` steps, ratios are to the inner policy's log-probs before the update.

    Samples are the whole policy's, so such a ratio is no importance ratio.
    """

    def before(batch: Batch) -> Array:
        found: Array = learn.objective(models, batch, peek)({"policy": models[0]["policy"]})[1]["inner_logp"]
        return found

    logp = jax.lax.cond(batch.step < steps, before, lambda batch: batch.rollouts.logp, batch)
    batch = replace(batch, rollouts=replace(batch.rollouts, logp=logp))
    return several_passes(key, models, batch, learn, minibatches=minibatches)


def bupo(
    *,
    group_size: int = 8,
    layer: int = 5,
    steps: int = 30,
    clip: float = 0.2,
    bound: float = 10.0,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` that begins with an inner layer's policy: what the output layer makes of the residual stream there.

    Layers above learn nothing at first. Then it is `grpo` of the whole policy, on lower layers that know more.

    Source: "Bottom-up Policy Optimization", 2512.19673, and the released code.
    Deviations: the inner policy's temperature is 1 whatever the run's. After the first steps its log-probs are still
      computed, and not used. Needs a model that shows its layers (`Model.inner`).
    Limit: with steps=0 it is `grpo` with kl=None, `token_mean` and `dual_clip`.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.
      layer: k, from 0; 5 for Qwen3-4B.
      steps: of the inner policy; 30 of 300. With too many the whole policy collapses.
      clip: both widths.
      bound: of the ratio where the advantage is negative.
      minibatches: optimiser steps a batch; 4 in the paper.  # 1: not in the paper
    """
    if layer < 0 or steps < 0:
        raise ValueError(f"bupo: layer and steps must not be negative, got {layer} and {steps}")
    clipped = PolicyLoss(surrogate=partial(dual_clip, low=clip, high=clip, bound=bound), aggregate=token_mean)
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=partial(bottom_up, loss=clipped, steps=steps),
        update=partial(against_inner, steps=steps, minibatches=minibatches),
        measures={"inner_logp": partial(inner_logp, layer=layer)},
    )
