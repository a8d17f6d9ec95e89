"""BAPO: balanced policy optimisation with adaptive clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.types import Batch, Scores, masked
from jaxrl_llm.updates.passes import several_passes

Measure = Callable[[Array, Array, Array, Array], Array]
Search = Callable[[Callable[[Array], Array]], Array]
Bound = float | Array


def in_loss(ratio: Array, advantage: Array, low: Array, high: Array) -> Array:
    """`A min(r, high)` or, for negative `A`, `A max(r, low)`: a clipped token counts with its bound (released code)."""
    return advantage * jnp.where(advantage >= 0, jnp.minimum(ratio, high), jnp.maximum(ratio, low))


def in_gradient(ratio: Array, advantage: Array, low: Array, high: Array) -> Array:
    """`A r` of the tokens that are not clipped. Raising `low` silences bad tokens, as it is meant to."""
    return masked(jnp.where(advantage >= 0, ratio <= high, ratio >= low), advantage * ratio)


def balance(parts: Array) -> Array:
    """What the good tokens contribute over what the bad ones do, `[]`; infinite without bad ones."""
    good, bad = jnp.maximum(parts, 0).sum(), -jnp.minimum(parts, 0).sum()
    return jnp.where(bad > 0, good / (bad + 1e-8), jnp.inf)


def raised(enough: Callable[[Array], Array], *, start: Bound, end: Bound, step: Bound) -> Array:
    """The first of `start, start + step, ... end` that is enough; `end` if none is."""

    def go_on(bound: Array) -> Array:
        return ~enough(bound) & (bound < end) & (jnp.asarray(step) > 0)

    return jax.lax.while_loop(go_on, lambda bound: jnp.minimum(bound + step, end), jnp.asarray(start, jnp.float32))


def balanced_bounds(
    scores: Scores, batch: Batch, *, low: Search, high: Search, target: Bound, measure: Measure
) -> dict[str, Array]:
    """Widths of the clip: the lower bound is raised until the balance is at least `target`, then the upper one.

    Raises:
      ValueError: no advantage was computed.
    """
    if batch.advantage is None:
        raise ValueError("balanced_bounds needs batch.advantage")
    ratio, advantage = jax.lax.stop_gradient((token_ratio(scores, batch), masked(batch.mask, batch.advantage)))
    start = high(lambda bound: jnp.ones((), bool))
    lower = low(lambda bound: balance(measure(ratio, advantage, bound, start)) >= target)
    upper = high(lambda bound: balance(measure(ratio, advantage, lower, bound)) >= target)
    return {"low": 1 - lower, "high": upper - 1}


def bapo(
    *,
    group_size: int = 8,
    low: float = 0.6,
    low_end: float = 0.9,
    low_step: float = 0.05,
    high: float = 1.2,
    high_end: float = 3.0,
    high_step: float = 0.05,
    target: float = 1.0,
    measure: Measure = in_loss,
    bound: float = 3.0,
    epochs: int = 2,
    minibatches: int = 4,
) -> Algorithm:
    """`grpo` whose clip bounds are found in every update, so that bad answers do not outweigh the good ones.

    Source: "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive
      Clipping", 2510.18927; steps of the bounds, measure and token mean of the released code.
    Deviations: none known. With the released measure a higher lower bound makes bad tokens weigh more, not less;
      `measure=in_gradient` does what the paper wants of it.
    Limit: with both ends at their starts it is PPO's clip with these bounds, and the dual clip at `bound`.
    Family: objective and clipping.

    Args:
      group_size: 16 in the paper.  # 8: not in the paper
      low: where the ratio's lower bound starts.
      low_end: the highest it gets.
      low_step: by which it is raised.
      high: where the upper bound starts.
      high_end: the highest it gets.
      high_step: by which it is raised.
      target: the least balance; 1 is the paper's share of one half.
      measure: what a token contributes to the balance.
      bound: of the ratio where the advantage is negative.
      epochs: passes over a batch.
      minibatches: optimiser steps a pass; the prompts must divide into them.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            surrogate=partial(dual_clip, bound=bound),
            aggregate=token_mean,
            prepare=partial(
                balanced_bounds,
                low=partial(raised, start=low, end=low_end, step=low_step),
                high=partial(raised, start=high, end=high_end, step=high_step),
                target=target,
                measure=measure,
            ),
        ),
        update=partial(several_passes, epochs=epochs, minibatches=minibatches),
    )
