"""EPO: entropy-regularised policy optimisation for language-model agents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.band import Band, Number, no_history, outside, remember, with_history
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.types import Batch, LossStage, Memory, Metrics, Scores, masked


def phase(step: Array, *, steps: int) -> Array:
    """`b`, `[]`: from 1 down to 0.83 in the first half of the run, from 0.8 to 0.04 in the second."""
    half = steps // 2
    early = 1 - 0.2 * (1 - jnp.exp(-2.0 * step / max(half, 1)))
    late = 0.8 * jnp.exp(-3.0 * (step - half) / max(steps - half, 1))
    return jnp.where(step <= half, early, late)


def with_band(
    memory: Memory,
    key: Array,
    scores: Scores,
    batch: Batch,
    *,
    loss: Callable[..., tuple[Array, Metrics]],
    band: Band,
    schedule: Callable[[Array], Array],
    entropy: Number,
    smoothing: Number,
    low: Number,
    high: Number,
    penalty: Number,
) -> tuple[tuple[Array, Metrics], Memory]:
    """`loss - entropy * (mean H - b * smoothing * mean P)`, both means over all tokens of the step.

    Raises:
      ValueError: the entropy was not computed, or the history not prepared.
    """
    if scores.entropy is None or batch.prepared is None:
        raise ValueError("with_band needs scores.entropy and batch.prepared; run it through the engine")
    value, metrics = loss(scores, replace(batch, prepared=None))
    found, h = batch.prepared, masked(batch.mask, scores.entropy)
    outliers = masked(batch.mask, band(h, low * found["history"], high * found["history"], penalty))
    smooth = jnp.where(found["half_way"], smoothing * schedule(batch.step), 0.0)
    bonus = entropy * jnp.sum(found["share"] * (h - smooth * outliers))
    return (value - bonus, {**metrics, "loss/entropy": -bonus, "outside_band": outliers}), memory


def epo_agents(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    entropy: float = 0.001,
    smoothing: float = 1.0,
    low: float = 0.0,
    high: float = 2.0,
    penalty: float = 0.05,
    band: Band = outside,
    steps: int = 150,
    turns: int = 30,
) -> Algorithm:
    """`grpo` with an entropy bonus, less a penalty for tokens far from the mean entropy of their turn so far.

    Agents of many turns spread early and collapse late; the band is around what the run has known, and the penalty
    counts less as the run goes on. It begins when a row comes half way through the turns.

    Source: "EPO: Entropy-regularized Policy Optimization for LLM Agents", 2509.22576, and the released code, of which
      `band=outside` has no gradient: there the method equals an entropy bonus. `hinge` is the form that has one.
    Deviations: the history is of the entropies at sampling time, and kept by turn; the released code pads short
      episodes on the left, which shifts their turns. Whether a row is half way is asked of the optimiser step, not of
      each micro-batch. No divergence. A rollout without turns is one turn.
    Limit: with entropy=0.0 it is `grpo` with kl=None.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip: both widths.  # not in the paper
      entropy: lambda, of bonus and penalty.
      smoothing: of the penalty, before the phase.
      low: of the history, the lower end of the band.
      high: the upper end.
      penalty: of a token outside; 0.05 (ScienceWorld), 0.1 (ALFWorld).
      band: `outside` or `hinge`.
      steps: of the whole run, for the phase.
      turns: that are remembered, the most an episode has.  # 30: not in the paper

    Raises:
      ValueError: `steps` or `turns` is below 1.
    """
    if steps < 1 or turns < 1:
        raise ValueError(f"epo_agents: steps and turns must be 1 or more, got {steps} and {turns}")
    loss = PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=sequence_mean_token_mean)
    smooth = partial(with_band, loss=loss, band=band, schedule=partial(phase, steps=steps))
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=LossStage(
            init=partial(no_history, turns=turns),
            apply=partial(smooth, entropy=entropy, smoothing=smoothing, low=low, high=high, penalty=penalty),
            observe=remember,
            aggregate=loss.aggregate,
            prepare=with_history,
        ),
    )
