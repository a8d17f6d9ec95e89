"""How often a batch is learnt from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Metrics

Learn = Callable[[Any, Batch], tuple[Any, Metrics]]


def one_pass(key: Array, models: Any, batch: Batch, learn: Learn) -> tuple[Any, Metrics]:
    """One optimiser step on the whole batch."""
    return learn(models, batch)


def several_passes(
    key: Array, models: Any, batch: Batch, learn: Learn, *, epochs: int = 1, minibatches: int = 1
) -> tuple[Any, Metrics]:
    """`epochs` passes, each an optimiser step on every one of `minibatches` random parts of the prompts.

    Groups stay whole. Metrics are means over the steps; those named `.../max` and `.../min` are extremes, and
    `gap/...` (trainer against sampler) is that of the first step, before the policy moved.

    Raises:
      ValueError: the prompts do not divide into `minibatches`.
    """
    prompts = batch.rollouts.tokens.shape[0]
    if prompts % minibatches:
        raise ValueError(f"{prompts} prompts do not divide into {minibatches} minibatches")
    order = jnp.concatenate([jax.random.permutation(k, prompts) for k in jax.random.split(key, epochs)])
    parts = order.reshape(epochs * minibatches, -1)
    models, metrics = jax.lax.scan(lambda models, rows: learn(models, select(batch, rows)), models, parts)
    return models, {name: _over_steps(name, x) for name, x in metrics.items()}


def select(batch: Batch, rows: Array) -> Batch:
    """The given prompts of a batch; scalars are kept."""
    chosen: Batch = jax.tree.map(lambda x: x[rows] if jnp.ndim(x) else x, batch)
    return chosen


def _over_steps(name: str, x: Array) -> Array:
    if name.startswith("gap/"):
        return x[0]
    kind = name.rsplit("/", 1)[-1]
    return {"max": jnp.max, "min": jnp.min}.get(kind, jnp.mean)(x, axis=0)
