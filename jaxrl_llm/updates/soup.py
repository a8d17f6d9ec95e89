"""A reference made of two models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics, PyTree
from jaxrl_llm.updates.passes import one_pass


def averaged(first: PyTree, second: PyTree, *, share: float | Array = 0.5) -> PyTree:
    """`share * first + (1 - share) * second`, leaf by leaf, computed in float32 (model soups, 2203.05482)."""

    def mean(a: Array, b: Array) -> Array:
        return (share * a.astype(jnp.float32) + (1 - share) * b.astype(jnp.float32)).astype(b.dtype)

    return jax.tree.map(mean, first, second)


def soup_first(
    key: Array,
    models: Any,
    batch: Batch,
    learn: Callable[..., Any],
    *,
    share: float | Array = 0.5,
    update: Callable[..., tuple[Any, Metrics]] = one_pass,
) -> tuple[Any, Metrics]:
    """`update`, from the second step on: the first one makes the reference `averaged(policy, reference)`.

    That step's rollouts were scored by the reference before, so nothing else is kept of it.

    Raises:
      ValueError: the recipe reads no reference.
    """
    if "reference" not in models[0]:
        raise ValueError("soup_first makes the reference, and this recipe reads none, so that none is kept")
    first = batch.step == 0
    learned, metrics = update(key, models, batch, learn)
    params, states = jax.tree.map(lambda old, new: jnp.where(first, old, new), models, learned)
    soup = averaged(models[0]["policy"], models[0]["reference"], share=share)
    reference = jax.tree.map(lambda new, old: jnp.where(first, new, old), soup, params["reference"])
    return ({**params, "reference": reference}, states), metrics
