"""Turning a run's knobs between steps: nothing here makes the step compile again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm.types import TrainState


def adjust(
    state: TrainState,
    *,
    sampling: Mapping[str, Any] | None = None,
    numbers: Mapping[str, Any] | None = None,
    learning_rate: Any = None,
    role: str = "policy",
) -> TrainState:
    """The state with other numbers, of the dtypes and shapes it had.

    Args:
      state: of a learner.
      sampling: fields of `Sampling`, e.g. `{"temperature": 0.7}`. A filter the run was built without stays out.
      numbers: numbers of the recipe by path, e.g. `{"loss.surrogate.high": 0.3}`; `algorithm.numbers` lists them.
      learning_rate: of the role's optimiser, if it is `adamw` or another `optax.inject_hyperparams`.
      role: whose optimiser.

    Raises:
      KeyError: the recipe has no such number, or the optimiser keeps no learning rate in its state.
      ValueError: a filter that is not in the program.
    """
    for name, value in (sampling or {}).items():
        old = getattr(state.sampling, name)
        if old is None:
            raise ValueError(
                f"{name} is not in the program of this run: build the learner with Sampling({name}=...), "
                f"a value that switches it off will do"
            )
        state = dataclasses.replace(state, sampling=dataclasses.replace(state.sampling, **{name: _like(value, old)}))
    for path, value in (numbers or {}).items():
        if path not in state.numbers:
            raise KeyError(f"no number {path!r} in this recipe; it has {', '.join(sorted(state.numbers)) or 'none'}")
        state = dataclasses.replace(state, numbers={**state.numbers, path: _like(value, state.numbers[path])})
    if learning_rate is not None:
        found = state.opt_state[role]
        if "learning_rate" not in getattr(found, "hyperparams", {}):
            raise KeyError(f"the optimiser of {role!r} keeps no learning_rate in its state: build it with adamw()")
        rate = _like(learning_rate, found.hyperparams["learning_rate"])
        changed = found._replace(hyperparams={**found.hyperparams, "learning_rate": rate})
        state = dataclasses.replace(state, opt_state={**state.opt_state, role: changed})
    return state


def _like(value: Any, old: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(value, old.dtype), old.shape)
