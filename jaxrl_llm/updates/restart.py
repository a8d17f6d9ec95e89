"""Training that begins anew from where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics, PyTree
from jaxrl_llm.updates.passes import one_pass


def restarting(
    key: Array,
    models: Any,
    batch: Batch,
    learn: Callable[..., Any],
    *,
    step: int,
    update: Callable[..., tuple[Any, Metrics]] = one_pass,
) -> tuple[Any, Metrics]:
    """`update`; at the end of step `step - 1` the policy becomes the reference, and the policy's optimiser starts anew.

    So that step `step`, counted from 0, is scored by the new reference. With `step=0` nothing ever changes.
    """
    (params, states), metrics = update(key, models, batch, learn)
    now = batch.step + 1 == step

    def either(new: PyTree, old: PyTree) -> PyTree:
        return jax.tree.map(lambda a, b: jnp.where(now, a, b), new, old)

    if "reference" in params:
        params = {**params, "reference": either(params["policy"], params["reference"])}
    return (params, {**states, "policy": either(without_history(states["policy"]), states["policy"])}), metrics


def without_history(state: PyTree) -> PyTree:
    """An optimiser's state with zeros for everything but its hyperparameters: as optax's optimisers begin."""

    def fresh(path: tuple[Any, ...], x: Array) -> Array:
        set_by_user = any(getattr(entry, "name", None) == "hyperparams" for entry in path)
        return x if set_by_user else jnp.zeros_like(x)

    return jax.tree.map_with_path(fresh, state)
