"""What the policy of the step before says of a batch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Learn, Memory, Metrics, Problem, Stage
from jaxrl_llm.updates.passes import one_pass


def with_previous(update: Callable[..., tuple[Any, Metrics]] = one_pass) -> Stage:
    """`update` on a batch whose `old.extras["previous"]`, `[B G T]`, are log-probs under the parameters of a step ago.

    They are those of `batch.old` in the first step. Costs a copy of the policy and a forward pass.
    """
    return Stage(init=_start, apply=functools.partial(_apply, update=update))


def previous(batch: Batch) -> Array:
    """`[B G T]`: log-probs of the policy of the step before; those of the policy before the update if nobody asked it.

    Raises:
      ValueError: the latter were not computed.
    """
    if batch.old is None or batch.old.logp is None:
        raise ValueError("previous needs batch.old.logp: the engine adds it for recipes that read it")
    return batch.old.extras.get("previous", batch.old.logp)


def _start(problem: Problem) -> Memory:
    return jax.tree.map(jnp.array, problem.params["policy"])


def _apply(
    memory: Memory, key: Array, models: Any, batch: Batch, learn: Learn, *, update: Callable[..., Any]
) -> tuple[tuple[Any, Metrics], Memory]:
    params, states = models
    world = learn.world(({**params, "policy": memory}, states))
    logp = jax.lax.stop_gradient(world.score("policy", batch.rollouts).logp)
    if batch.old is None or logp is None:
        raise ValueError("with_previous completes batch.old: use it in a recipe that reads recomputed log-probs")
    old = dataclasses.replace(batch.old, extras={**batch.old.extras, "previous": logp})
    return update(key, models, dataclasses.replace(batch, old=old), learn), params["policy"]
