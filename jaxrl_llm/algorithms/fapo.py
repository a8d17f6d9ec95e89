"""FAPO: flawed-aware policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.filters.basic import everything
from jaxrl_llm.rewards.length import overlong
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.types import Batch


def nobody(batch: Batch) -> Array:
    """`[B G]` bool: no row is flawed."""
    return jnp.zeros(batch.outcome.shape, bool)


def less_if_flawed(
    batch: Batch, *, flawed: Callable[[Batch], Array], penalty: float | Array, threshold: float | Array = 0.5
) -> Array:
    """`[B G]`: 1 for a right answer, `1 - penalty` if its reasoning is flawed, -1 for a wrong one."""
    right = batch.outcome > threshold
    return jnp.where(right, 1.0 - penalty * flawed(batch), -1.0)


def error_position(predicted: Array, truth: Array, steps: Array) -> Array:
    """The reward that trains the verifier, `[...]`: how near the first wrong step it names is to the true one.

    Args:
      predicted: int; -1 for no error.
      truth: int; -1 for no error.
      steps: int, how many the solution has.

    Returns:
      1 or -1 where one of the two is -1, else `1 - |predicted - truth| / steps`. An answer that cannot be read is -1.
    """
    near = 1 - jnp.abs(predicted - truth) / jnp.maximum(steps, 1)
    either = (predicted == -1) | (truth == -1)
    return jnp.where(either, jnp.where(predicted == truth, 1.0, -1.0), near)


def fapo(
    *,
    group_size: int = 8,
    penalty: float = 1.0,
    flawed: Callable[[Batch], Array] = nobody,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    limit: int | None = None,
    cache: int | None = None,
    minibatches: int = 1,
) -> Algorithm:
    """`dapo` without dynamic sampling that pays less for right answers reached by wrong reasoning.

    With the penalty 1 they count as 0 between 1 and -1: above the mean while most answers are wrong, below it once
    sound ones outnumber flawed ones. The switch needs no schedule.

    Source: "FAPO: Flawed-Aware Policy Optimization", 2510.22543, and its released code.
    Deviations: the generative verifier that finds flaws is the user's, as `flawed`; without one no row is flawed.
      `error_position` is the reward that trains such a verifier.
    Limit: with penalty=0, or if no row is flawed, it is `dapo` with the `everything` filter and without new samples.
    Family: rewards and budgets.

    Args:
      group_size: 8 in the paper.
      penalty: lambda.
      flawed: `(Batch) -> [B G]` bool, rows with a wrong step; asked of all rows, used for right ones.
      clip_low: lower width.
      clip_high: upper width.
      limit: tokens; the generation budget if None.
      cache: tokens below the limit where the length punishment starts; 4096 in the paper, a fifth of the limit if None.
      minibatches: optimiser steps a batch; 16 in the paper.  # 1: the clip acts from the second on
    """
    return replace(
        dapo(group_size=group_size, clip_low=clip_low, clip_high=clip_high, minibatches=minibatches),
        rollout=partial(sample_group, size=group_size),
        reward=chain(
            partial(less_if_flawed, flawed=flawed, penalty=penalty), partial(overlong, limit=limit, cache=cache)
        ),
        filter=everything,
    )
