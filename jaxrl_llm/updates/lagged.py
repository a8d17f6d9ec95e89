"""A copy of the policy that stays behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics
from jaxrl_llm.updates.passes import one_pass


def renewed_copy(
    key: Array,
    models: Any,
    batch: Batch,
    learn: Callable[..., Any],
    *,
    every: int,
    update: Callable[..., tuple[Any, Metrics]] = one_pass,
) -> tuple[Any, Metrics]:
    """`update`; after steps `every - 1`, `2 * every - 1`, ... the role "lagged" becomes the policy.

    Raises:
      ValueError: `every` is below 1, or no measure of the recipe asks for the role "lagged".
    """
    if every < 1:
        raise ValueError(f"renewed_copy: every must be at least 1 step, got {every}")
    (params, states), metrics = update(key, models, batch, learn)
    if "lagged" not in params:
        raise ValueError("renewed_copy renews the role 'lagged', which no measure of this recipe asks for")
    due = (batch.step + 1) % every == 0
    lagged = jax.tree.map(lambda new, old: jnp.where(due, new, old), params["policy"], params["lagged"])
    return ({**params, "lagged": lagged}, states), metrics
