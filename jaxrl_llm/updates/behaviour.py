"""A copy of the policy that is trained to sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm.types import Batch, Learn, PyTree
from jaxrl_llm.updates.passes import select

Models = tuple[dict[str, PyTree], dict[str, PyTree]]


def descended(
    key: Array,
    models: Models,
    batch: Batch,
    learn: Learn,
    *,
    loss: Callable[..., Any],
    rate: float | Array,
    norm: float | Array,
    target: float | Array,
    epochs: int,
    minibatches: int,
) -> tuple[PyTree, Array]:
    """The policy's parameters after descending `loss` on the batch by Adam (eps 1e-5), and the last `behaviour_kl`.

    It stops after the first part of the batch on which that was above `target`. The policy itself stays as it is.

    Args:
      key: of the order of the prompts.
      models: parameters by role, and optimiser states.
      batch: what to unlearn.
      learn: differentiates.
      loss: `(Scores, Batch) -> (scalar, metrics)`, with the metric `behaviour_kl`.
      rate: of Adam.
      norm: the gradient is clipped to.
      target: of the divergence.
      epochs: passes, at least 1.
      minibatches: parts of a pass.

    Raises:
      ValueError: the prompts do not divide into `minibatches`.
    """
    prompts = batch.outcome.shape[0]
    if prompts % minibatches:
        raise ValueError(f"{prompts} prompts do not divide into {minibatches} minibatches")
    optimizer, policy = optax.chain(optax.clip_by_global_norm(norm), optax.adam(rate, eps=1e-5)), models[0]["policy"]
    orders = [jax.random.permutation(k, prompts) for k in jax.random.split(key, epochs)]
    parts = jnp.concatenate(orders).reshape(epochs * minibatches, -1)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, params, history, _ = state
        now = {**models[0], "policy": params}, models[1]
        (_, found), slopes = learn.gradient(now, select(batch, parts[i]), loss)
        change, history = optimizer.update(slopes["policy"], history, params)
        return i + 1, optax.apply_updates(params, change), history, found["behaviour_kl"]

    start = jnp.zeros((), jnp.int32), policy, optimizer.init(policy), jnp.zeros(())

    def going(state: tuple[Any, ...]) -> Array:
        more: Array = (state[0] < len(parts)) & (state[3] <= target)
        return more

    _, params, _, kl = jax.lax.while_loop(going, step, start)
    return params, kl
