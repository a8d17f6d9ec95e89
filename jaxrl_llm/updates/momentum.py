"""Steps along an average of gradients, and their schedules."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm.types import Problem, PyTree

Schedule = Callable[[Array], Array]
Direction = Callable[[PyTree], PyTree]


def decaying(t: Array, *, scale: float | Array = 1.0, power: float | Array = 1.0) -> Array:
    """`scale * (2 / (t + 2))^power`, which starts at `scale`."""
    return scale * (2.0 / (t + 2.0)) ** power


def constant(t: Array, *, value: float | Array) -> Array:
    """`value` at every step."""
    return jnp.asarray(value)


# Of the theory of 2302.01734; the scale of the second is ours.
NEW_WEIGHT: Schedule = functools.partial(decaying, power=0.8)
STEP_SIZE: Schedule = functools.partial(decaying, scale=0.01, power=1.0)


def start_here(problem: Problem) -> dict[str, PyTree]:
    """Memory of an update that steps by itself: the policy's parameters, and no gradient yet."""
    policy = problem.params["policy"]
    # A copy: a state is donated to its first step, and no buffer can be donated twice.
    return {"params": jax.tree.map(jnp.array, policy), "slope": jax.tree.map(jnp.zeros_like, policy)}


def averaged(old: PyTree, new: PyTree, weight: float | Array) -> PyTree:
    """`(1 - weight) * old + weight * new`."""
    return jax.tree.map(lambda a, b: ((1 - weight) * a + weight * b).astype(a.dtype), old, new)


def moved(params: PyTree, direction: PyTree, size: float | Array) -> PyTree:
    """`params + size * direction`."""
    return jax.tree.map(lambda p, d: (p + size * d).astype(p.dtype), params, direction)


def unit(direction: PyTree) -> PyTree:
    """`direction / |direction|` over all leaves together; 0 where it is 0."""
    norm = optax.tree.norm(direction)
    return jax.tree.map(lambda d: d / jnp.where(norm > 0, norm, 1.0), direction)


def unscaled(direction: PyTree) -> PyTree:
    """`direction`."""
    return direction
