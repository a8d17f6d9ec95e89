"""OSPO: one-step policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.fleet import step_advantage
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.kl import k3_straight_through, kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.types import Batch, Metrics, Scores, Stage
from jaxrl_llm.updates.best import near_the_best, no_best


def near(scores: Scores, batch: Batch, *, loss: PolicyLoss, weight: float | Array) -> tuple[Array, Metrics]:
    """`loss + weight * KL(pi || reference)`, and the metric `kl`: the divergence, estimated on the sampled tokens.

    Raises:
      ValueError: the engine's share is missing.
    """
    if batch.share is None:
        raise ValueError("near needs batch.share; run it through the engine")
    value, metrics = loss(scores, batch)
    kl = jnp.sum(batch.share * kl_to_reference(scores, batch, weight=1.0, estimator=k3_straight_through))
    return value + weight * kl, {**metrics, "kl": kl}


def ospo(
    *,
    group_size: int = 8,
    turns: int = 1,
    fairness: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    entropy: float | None = 0.05,
    weight: float = 0.5,
    bound: float = 0.01,
    every: int = 10,
    updates: int = 10,
) -> Algorithm:
    """`grpo` that compares what is earned at once, in each turn, and takes away what makes earnings unequal.

    Many alike agents in one environment are the group. No value and no return: what a turn brings later does not count.

    Source: "One-step policy optimisation", 2507.15351, and its released code.
    Deviations: the agents are the rollouts of a prompt, and a step a turn. What is judged is the mean reward of the
      training rollouts, not that of greedy ones. The divergence is estimated on the sampled tokens. Updates are passes
      over the batch, not random parts of a buffer; the learning rate's decay (0.99 a step) is the optimiser's.
    Limit: with one turn and fairness=0 its advantage is that of `grpo` with the population's deviation.
    Family: credit.

    Args:
      group_size: agents; 1000 in the paper.  # 8: not in the paper
      turns: how many there are at most; without turns a response is one.  # not in the paper
      fairness: how much of the growth in the standard deviation of what the agents have earned is taken from all.
      clip_low: lower width.
      clip_high: upper width.
      entropy: weight of the entropy bonus.
      weight: of the divergence from the best policy so far, from the first time a judged policy was not better.
      bound: a pass that finds more divergence is skipped from then on, and doubles the weight for the step's others.
      every: steps between two judgements.
      updates: passes a step.

    Raises:
      ValueError: an integer below 1.
    """
    if min(turns, every, updates) < 1:
        raise ValueError(f"ospo: {turns=}, {every=} and {updates=} must be at least 1")
    loss = PolicyLoss(
        surrogate=partial(clip_min, low=clip_low, high=clip_high), terms=optional(entropy_bonus, weight=entropy)
    )
    held = partial(near, loss=loss)
    update = partial(near_the_best, loss=held, weight=weight, bound=bound, every=every, updates=updates)
    return replace(
        grpo(group_size=group_size),
        advantage=partial(step_advantage, turns=turns, fairness=fairness),
        loss=partial(held, weight=weight),
        update=Stage(init=no_best, apply=update),
    )
