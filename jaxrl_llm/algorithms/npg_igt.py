"""N-PG-IGT: normalised policy gradient with implicit gradient transport."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.types import Batch, Learn, Metrics, PyTree, Stage
from jaxrl_llm.updates.momentum import NEW_WEIGHT, STEP_SIZE, Schedule, averaged, moved, start_here, unit

Memory = dict[str, PyTree]
Models = tuple[dict[str, PyTree], dict[str, PyTree]]


def look_ahead(new: PyTree, old: PyTree, eta: Array) -> PyTree:
    """`theta_t + (1 - eta) / eta * (theta_t - theta_{t-1})`: where the average of gradients is one of `theta_t`."""
    return averaged(old, new, 1 / eta)


def transported_step(
    memory: Memory, key: Array, models: Models, batch: Batch, learn: Learn, *, eta: Schedule, gamma: Schedule
) -> tuple[tuple[Models, Metrics], Memory]:
    """`theta_{t+1}` in memory, with `d_t` (as a slope of the loss); the next look-ahead is the new policy."""
    (_, metrics), slopes = learn.gradient(models, batch)
    weight = jnp.where(batch.step == 0, 1.0, eta(batch.step))  # d_0 = g_0
    slope = averaged(memory["slope"], slopes["policy"], weight)
    params = moved(memory["params"], unit(slope), -gamma(batch.step))
    ahead = look_ahead(params, memory["params"], eta(batch.step + 1))
    metrics = {**metrics, "grad_norm": optax.tree.norm(slopes["policy"]), "slope_norm": optax.tree.norm(slope)}
    return (({**models[0], "policy": ahead}, models[1]), metrics), {"params": params, "slope": slope}


def npg_igt(
    *,
    group_size: int = 8,
    eta: Schedule = NEW_WEIGHT,
    gamma: Schedule = STEP_SIZE,
) -> Algorithm:
    """`reinforce` whose steps follow an average of gradients and have a given length.

    Gradients of past parameters would bias the average. So the rollouts are those of a *look-ahead* policy, as far
    beyond the parameters as the average lags behind them: on a quadratic the average is then the gradient itself.

    `params["policy"]`, which samples and is evaluated, is the look-ahead policy; the parameters `theta` are
    `memory["update"]["params"]`. `gamma` is the step size: the optimiser given to `learner()` is not used.

    Source: "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies",
      2302.01734, N-PG-IGT.
    Deviations: the gradient is `reinforce`'s, with the mean reward of the step as baseline. The constants of the
      step size are not known to us.
    Limit: eta=1 is normalised stochastic gradient ascent with `reinforce`'s gradient.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.  # not in the paper
      eta: weight of the new gradient by step; `(2 / (t + 2))^(4/5)` in the theory, a constant of 0.1 to 0.8 in practice
        (`momentum.constant`).
      gamma: length of a step by step, falling as `1 / (t + 2)`.  # 0.01: not in the paper
    """
    return replace(
        reinforce(group_size=group_size),
        update=Stage(init=start_here, apply=partial(transported_step, eta=eta, gamma=gamma)),
    )
