"""A critic that learns before the policy does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics
from jaxrl_llm.updates.passes import one_pass


def critic_first(
    key: Array,
    models: Any,
    batch: Batch,
    learn: Callable[..., Any],
    *,
    steps: int,
    update: Callable[..., tuple[Any, Metrics]] = one_pass,
) -> tuple[Any, Metrics]:
    """`update`, of which only the critic keeps anything for the first `steps` steps (VC-PPO, 2503.01491).

    Responses are sampled and judged all the same, so that the critic learns the values of a policy that stands still.
    """
    (params, states), metrics = update(key, models, batch, learn)

    def ready(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(batch.step >= steps, a, b), new, old)

    def chosen(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
        return {role: x if role == "critic" else ready(x, old[role]) for role, x in new.items()}

    return (chosen(params, models[0]), chosen(states, models[1])), metrics
