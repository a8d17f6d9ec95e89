"""Deep GA: a genetic algorithm on the parameters, without gradients."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Learn, Metrics, Problem, Prompts, PyTree, Stage, split
from jaxrl_llm.updates.momentum import moved


def first_parents(problem: Problem, *, count: int) -> PyTree:
    """As many copies of the policy, leaves `[count ...]`."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), problem.params["policy"])


def children(parents: PyTree, key: Array, *, count: int, sigma: float | Array) -> PyTree:
    """`theta + sigma * noise` of a parent chosen uniformly, `count` times: leaves `[count ...]`."""
    keys = split(key, "parent", "noise")
    chosen = jax.random.randint(keys["parent"], (count,), 0, jax.tree.leaves(parents)[0].shape[0])
    noise = jax.vmap(optax.tree.random_like)(jax.random.split(keys["noise"], count), _rows(parents, chosen))
    return moved(_rows(parents, chosen), noise, sigma)


def fitness(learn: Learn, models: Any, population: PyTree, key: Array, prompts: Prompts, size: int) -> Array:
    """Mean reward of every policy over the same prompts with the same random numbers, `[count]`."""

    def of(params: PyTree) -> Array:
        world = learn.world(({**models[0], "policy": params}, models[1]))
        rollouts = world.sample(key, prompts, size)
        outcome = world.reward(rollouts)
        return masked_mean(outcome, ~jnp.isnan(outcome) & rollouts.mask.any(-1))

    return jax.vmap(of)(population)


def fittest(order: Array, elite: Array, count: int) -> Array:
    """The first `count - 1` of `order`, without the one at `elite` (nobody's place if it is negative)."""
    place = jnp.arange(count - 1)
    return order[place + ((elite >= 0) & (place >= elite))]


def generation(
    parents: PyTree,
    key: Array,
    models: Any,
    batch: Batch,
    learn: Learn,
    *,
    population: int,
    count: int,
    candidates: int,
    size: int,
    again: int,
    sigma: float | Array,
) -> tuple[tuple[Any, Metrics], PyTree]:
    """Children, and of them and the elite the next parents; the policy becomes the new elite.

    The elite is the best of the old one and the first children in a second evaluation, as the first one favours luck.
    """
    keys = split(key, "children", "first", "second")
    born = children(parents, keys["children"], count=population, sigma=sigma)
    first = fitness(learn, models, born, keys["first"], batch.prompts, size)
    order = jnp.argsort(-first)
    known = _joined(models[0]["policy"], _rows(born, order[: candidates - 1]))
    second = fitness(learn, models, known, keys["second"], batch.prompts, again)
    chosen = jnp.argmax(second)
    elite = _rows(known, chosen)
    metrics = {"fitness": first.mean(), "fitness/max": first.max(), "fitness/elite": second.max()}
    new = _joined(elite, _rows(born, fittest(order, chosen - 1, count)))
    return (({**models[0], "policy": elite}, models[1]), metrics), new


def _rows(tree: PyTree, rows: Array) -> PyTree:
    return jax.tree.map(lambda x: x[rows], tree)


def _joined(one: PyTree, several: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), one, several)


def deep_ga(
    *, population: int = 64, parents: int = 4, sigma: float = 0.002, candidates: int = 10, size: int = 1, again: int = 4
) -> Algorithm:
    """No gradient: mutate, keep the fittest. A baseline, for small policies: the whole population samples at once.

    Source: "Deep Neuroevolution: Genetic Algorithms Are a Competitive Alternative for Training Deep Neural Networks for
      Reinforcement Learning", 1712.06567, algorithm 1, and the released code.
    Deviations: the first generation mutates the given policy, which is its elite. As in the released code all of a
      population are children, and the elite is the first parent. Parents are arrays, not lists of seeds. Credit and
      loss slots, those of `reinforce`, and the optimiser are not used; the step's rollouts are the elite's.
    Limit: with sigma=0.0 nothing changes.
    Family: without gradients.

    Args:
      population: children a step.  # not in the paper: 1000 there
      parents: T, what is left of a population.  # not in the paper: 20 there
      sigma: standard deviation of a mutation; 0.002 to 0.005 in the paper.
      candidates: policies that are evaluated twice, the old elite among them.
      size: responses a prompt in the first evaluation.  # not in the paper
      again: responses a prompt in the second.  # not in the paper: 30 episodes there
    """
    if not 1 <= parents <= population or not 2 <= candidates <= population + 1:
        raise ValueError(
            f"deep_ga: parents must be in [1, {population}] and candidates in [2, {population + 1}] for a population "
            f"of {population}, got {parents} and {candidates}"
        )
    step = partial(
        generation, population=population, count=parents, candidates=candidates, size=size, again=again, sigma=sigma
    )
    return replace(reinforce(group_size=size), update=Stage(init=partial(first_parents, count=parents), apply=step))
