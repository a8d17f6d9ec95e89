"""A step's prompts in parts, one after the other: less memory, the same sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics, PyTree

T = TypeVar("T")


def parts(tree: T, n: int) -> T:
    """`[n, B / n, ...]`: part `i` holds prompts `i, i + n, ...`, so that every device keeps its share of each part.

    Raises:
      ValueError: the prompts do not divide.
    """

    def cut(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (n,))
        if x.shape[0] % n:
            raise ValueError(f"{x.shape[0]} prompts do not divide into {n} micro-batches (accumulate={n})")
        return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)

    cuts: T = jax.tree.map(cut, tree)
    return cuts


def joined(tree: T) -> T:
    """Undoes `parts`."""
    whole: T = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)
    return whole


def mapped(function: Callable[[Any], T], tree: Any, n: int) -> T:
    """`function(tree)`, computed in `n` parts; every array in and out has leading axis `B`."""
    return function(tree) if n == 1 else joined(jax.lax.map(function, parts(tree, n)))


def value_and_grad(
    both: Callable[[PyTree, Batch], tuple[tuple[Array, Metrics], PyTree]], params: PyTree, batch: Batch, n: int
) -> tuple[tuple[Array, Metrics], PyTree]:
    """Value, metrics and gradient of a sum over prompts, in `n` parts.

    Args:
      both: `jax.value_and_grad` of the objective, `(params, part) -> ((value, metrics), gradient)`.
      params: what the gradient is of.
      batch: arrays with leading axis `B`.
      n: parts. Scalar metrics add up; arrays have leading axis `B` and are put together again.
    """
    if n == 1:
        return both(params, batch)

    def body(carry: tuple[Array, PyTree], part: Batch) -> tuple[Any, Metrics]:
        (value, metrics), gradient = both(params, part)
        return jax.tree.map(jnp.add, carry, (value, gradient)), metrics

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, gradient), metrics = jax.lax.scan(body, zero, parts(batch, n))
    return (value, {k: x.sum(0) if x.ndim == 1 else joined(x) for k, x in metrics.items()}), gradient
