"""N-HARPG: policy gradient with Hessian-aided momentum."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.losses.likelihood import weighted_logp
from jaxrl_llm.stages import through
from jaxrl_llm.types import Batch, Learn, Metrics, PyTree, Stage, masked, split
from jaxrl_llm.updates.momentum import NEW_WEIGHT, STEP_SIZE, Direction, Schedule, averaged, moved, start_here, unit

Memory = dict[str, PyTree]
Models = tuple[dict[str, PyTree], dict[str, PyTree]]


def row_derivatives(learn: Learn, models: Models, batch: Batch, change: PyTree) -> Array:
    """`grad log p . change` of every row, `[B G]`."""

    def along(weight: Array) -> Array:
        objective = learn.objective(models, replace(batch, advantage=weight), weighted_logp)
        slope: Array = jax.jvp(lambda p: objective({"policy": p})[0], (models[0]["policy"],), (change,))[1]
        return slope

    # It is linear in the weights, so its gradient by them is every token's own derivative.
    return masked(batch.mask, jax.grad(along)(jnp.zeros(batch.mask.shape))).sum(-1)


def hessian_product(learn: Learn, models: Models, batch: Batch, change: PyTree) -> PyTree:
    """`E[grad Phi (grad log p)^T + grad^2 Phi] change`, `Phi` the loss of a row, over rollouts of the same policy.

    Without the first part, that the distribution of the rollouts changes too would be forgotten.
    """
    objective = learn.objective(models, batch)
    slope = jax.grad(lambda p: objective({"policy": p})[0])
    fixed = jax.jvp(slope, (models[0]["policy"],), (change,))[1]
    factor = row_derivatives(learn, models, batch, change)[..., None]
    weight = factor if batch.weight is None else factor * batch.weight
    _, moving = learn.gradient(models, replace(batch, weight=jnp.broadcast_to(weight, batch.mask.shape)))
    return moved(fixed, moving["policy"], 1.0)


def between(old: PyTree, new: PyTree, key: Array) -> PyTree:
    """A point of the line from `old` to `new`, uniformly."""
    return averaged(old, new, jax.random.uniform(key))


def corrected_step(
    memory: Memory,
    key: Array,
    models: Models,
    batch: Batch,
    learn: Learn,
    *,
    algorithm: Algorithm,
    eta: Schedule,
    gamma: Schedule,
    direction: Direction,
) -> tuple[tuple[Models, Metrics], Memory]:
    """A step along `d_t`, whose past is carried to here by the Hessian; the memory is `theta_t` and `d_t`."""
    keys = split(key, "between", "rollout", "slots")
    (_, metrics), slopes = learn.gradient(models, batch)
    params, old = models[0]["policy"], memory["params"]
    there = {**models[0], "policy": between(old, params, keys["between"])}, models[1]
    rollouts = algorithm.rollout(learn.world(there), keys["rollout"], batch.prompts)  # type: ignore[operator]
    other = through(algorithm, learn.batch(there, rollouts), keys["slots"])
    carried = hessian_product(learn, there, other, moved(params, old, -1.0))
    weight = jnp.where(batch.step == 0, 1.0, eta(batch.step))  # d_0 = g_0
    slope = averaged(moved(memory["slope"], carried, 1.0), slopes["policy"], weight)
    new = moved(params, direction(slope), -gamma(batch.step))
    metrics = {**metrics, "grad_norm": optax.tree.norm(slopes["policy"]), "slope_norm": optax.tree.norm(slope)}
    return (({**models[0], "policy": new}, models[1]), metrics), {"params": params, "slope": slope}


def harpg(
    *,
    group_size: int = 8,
    eta: Schedule = NEW_WEIGHT,
    gamma: Schedule = STEP_SIZE,
    direction: Direction = unit,
) -> Algorithm:
    """`reinforce` whose steps follow an average of gradients, the past carried to the new parameters by the Hessian.

    `d_t = (1 - eta) (d_{t-1} + H (theta_t - theta_{t-1})) + eta g_t`, with one stochastic Hessian-vector product at a
    random point of the last step, over rollouts of that point: a step samples twice. `gamma` is the step size: the
    optimiser given to `learner()` is not used.

    Source: "Stochastic Policy Gradient Methods: Improved Sample Complexity for Fisher-non-degenerate Policies",
      2302.01734, (N-)HARPG.
    Deviations: gradient and Hessian are those of `reinforce`, with the mean reward of the step as baseline. The
      constants of the step size are not known to us.
    Limit: eta=1 is stochastic gradient ascent with `reinforce`'s gradient, normalised or not.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.  # not in the paper
      eta: weight of the new gradient by step; a constant is `momentum.constant`.
      gamma: step size by step, falling as `1 / (t + 2)`.  # 0.01: not in the paper
      direction: `unit` for N-HARPG, `unscaled` for HARPG.
    """
    parent = reinforce(group_size=group_size)
    step = partial(corrected_step, algorithm=parent, eta=eta, gamma=gamma, direction=direction)
    return replace(parent, update=Stage(init=start_here, apply=step))
