"""VADE: variance-aware dynamic sampling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.choose import highest, kept, successes, take
from jaxrl_llm.types import Batch, Problem, Prompts, Stage

Counts = dict[str, Array]  # correct and wrong rollouts of each prompt, fading, [P]


def no_counts(problem: Problem) -> Counts:
    """Nothing known: every success rate is as probable as any other."""
    return {"right": jnp.zeros(problem.rows), "wrong": jnp.zeros(problem.rows)}


def information(rate: Array) -> Array:
    """`p (1 - p)^2`, highest at 1/3: hard prompts that can be solved."""
    return rate * jnp.square(1 - rate)


def most_informative(memory: Counts, key: Array, prompts: Prompts, *, candidates: int) -> tuple[Prompts, Counts]:
    """The prompts with the highest information at a success rate drawn from `Beta(right + 1, wrong + 1)`."""
    right, wrong = memory["right"][prompts.index], memory["wrong"][prompts.index]
    rate = jax.random.beta(key, right + 1, wrong + 1)
    return take(prompts, highest(information(rate), prompts.index, kept(prompts, candidates))), memory


def counted(memory: Counts, batch: Batch, *, decay: float | Array, visited_decay: float | Array) -> Counts:
    """All counts times `decay`, those of this step's prompts also times `visited_decay`; and the new ones added."""
    index, (right, rows) = batch.prompts.index, successes(batch)
    fade = jnp.full_like(memory["right"], decay)
    fade = fade.at[index].min(jnp.where(rows > 0, decay * visited_decay, decay))
    new = {"right": right, "wrong": rows - right}
    return {name: (fade * memory[name]).at[index].add(new[name]) for name in new}


def vade(*, group_size: int = 8, candidates: int = 4, decay: float = 0.99, visited_decay: float = 0.8) -> Algorithm:
    """`grpo` on prompts chosen by Thompson sampling: a posterior of each prompt's success rate, with forgetting.

    A group that is all right or all wrong teaches nothing; which prompts give one changes while the policy learns.

    Source: "VADE: Variance-Aware Dynamic Sampling", 2511.18902.
    Deviations: the account used here is partial: the two decays are not the authors'. Prompts are chosen from those
      drawn for the step, not from the whole data set.
    Limit: with candidates=1 it is `grpo`; with both decays 1 the posterior is that of independent trials.
    Family: sampling and curricula.

    Args:
      group_size: rollouts a prompt.
      candidates: prompts drawn for each one answered; a step answers `B / candidates`.  # not in the paper
      decay: of all counts, each step.  # not in the paper
      visited_decay: of the counts of prompts that were answered, besides.  # not in the paper

    Raises:
      ValueError: no candidates.
    """
    if candidates < 1:
        raise ValueError(f"vade keeps one prompt of `candidates`, which must be at least 1, got {candidates}")
    return replace(
        grpo(group_size=group_size),
        prompt=Stage(
            init=no_counts,
            apply=partial(most_informative, candidates=candidates),
            observe=partial(counted, decay=decay, visited_decay=visited_decay),
        ),
    )
