"""A reference that follows the policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

from jaxrl_llm.types import Batch, Metrics
from jaxrl_llm.updates.passes import one_pass


def averaged_reference(
    key: Array,
    models: Any,
    batch: Batch,
    learn: Callable[..., Any],
    *,
    decay: float | Array = 0.999,
    update: Callable[..., tuple[Any, Metrics]] = one_pass,
) -> tuple[Any, Metrics]:
    """`update`, then `reference <- decay * reference + (1 - decay) * policy`.

    With `decay=0.0` the reference of each step is the policy at its start.

    Raises:
      ValueError: the recipe reads no reference.
    """
    (params, opt_state), metrics = update(key, models, batch, learn)
    if "reference" not in params:
        raise ValueError("averaged_reference renews the reference, and this recipe reads none, so that none is kept")
    mixed = jax.tree.map(
        lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), params["reference"], params["policy"]
    )
    return ({**params, "reference": mixed}, opt_state), metrics
