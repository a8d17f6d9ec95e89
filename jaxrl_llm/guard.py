"""A learner that takes no step it would regret: an update that is not finite, or too large, changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Learner, Metrics, Prompts, PyTree, TrainState

SLOT = "guard"  # in `state.memory`
SAMPLED = ("prompt", "rollout")  # slots that remember what was drawn, not what was learnt


def guard(learner: Learner, *, max_norm: float = float("inf")) -> Learner:
    """The same learner, whose bad steps leave no trace in what it learns.

    A step is bad if its loss, the norm of a gradient or a parameter that it leaves behind is not finite, or if the norm
    of a gradient, before clipping, exceeds `max_norm`. Then parameters, optimiser and memories stay as they were, and
    the next step draws other prompts. What was sampled stays sampled: the memories of the `prompt` and `rollout` slots
    go on unless they would hold new values that are not finite, or a bad batch that is kept would return for ever.

    The choice is made inside the compiled step, where it costs a pass over the parameters. Where an update takes
    several optimiser steps, all of them count, and the norm is their mean.

    Args:
      learner: from `engine.learner`.
      max_norm: in `state.memory["guard"]["max_norm"]`, so that changing it compiles nothing.

    Returns:
      a learner with `state.memory["guard"]`: `max_norm`, and the int32 counters `skipped` (of the whole run) and
      `in_a_row`; and with metrics `skipped` (1.0 if this step was) and `skipped/total`.

    Raises:
      ValueError: `max_norm` is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"guard: max_norm must be positive, got {max_norm}")

    def init(key: Array) -> TrainState:
        counters = {"skipped": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)}
        return _with_memory(learner.init(key), {**counters, "max_norm": jnp.asarray(max_norm, jnp.float32)})

    def step(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        memory = state.memory[SLOT]
        old = dataclasses.replace(state, memory={slot: x for slot, x in state.memory.items() if slot != SLOT})
        new, metrics = learner.step(old, prompts)
        kept, memory = choose(old, new, metrics, memory)
        counted = {"skipped": (memory["in_a_row"] > 0).astype(jnp.float32), "skipped/total": memory["skipped"]}
        return _with_memory(kept, memory), {**metrics, **counted}

    choose = _choose if learner.compiled else jax.jit(_choose)
    return Learner(init, step, learner.compiled)


def _choose(old: TrainState, new: TrainState, metrics: Metrics, memory: PyTree) -> tuple[TrainState, PyTree]:
    good = is_sound(new, metrics, memory["max_norm"])

    def chosen(choice: Array, a: PyTree, b: PyTree) -> Any:
        return jax.tree.map(lambda x, y: x if x is y else jnp.where(choice, x, y), a, b)

    kept: TrainState = chosen(good, new, old)
    sampled = {
        slot: chosen(good | (_not_finite(new.memory[slot]) <= _not_finite(old.memory[slot])), new.memory[slot], x)
        for slot, x in old.memory.items()
        if slot in SAMPLED
    }
    skipped = memory["skipped"] + (~good).astype(jnp.int32)
    in_a_row = jnp.where(good, 0, memory["in_a_row"] + 1)
    kept = dataclasses.replace(kept, step=new.step, memory={**kept.memory, **sampled})
    return kept, {**memory, "skipped": skipped, "in_a_row": in_a_row}


def is_sound(state: TrainState, metrics: Metrics, max_norm: Array | float = float("inf")) -> Array:
    """`[]` bool: loss, gradient norms and trained parameters (if floats) are finite, and the norms in bounds."""
    norms = [x for name, x in metrics.items() if name.split("/")[0] == "grad_norm"]
    trained = [x for role in state.opt_state for x in jax.tree.leaves(state.params[role])]
    numbers = [*norms, *([metrics["loss"]] if "loss" in metrics else []), *trained]
    floats = [x for x in numbers if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    bounds = [x <= max_norm for x in norms]
    return jnp.stack([jnp.isfinite(x).all() for x in floats] + bounds).all()


def _not_finite(tree: PyTree) -> Array:
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.asarray(sum((~jnp.isfinite(x)).sum() for x in floats))


def _with_memory(state: TrainState, memory: Any) -> TrainState:
    return dataclasses.replace(state, memory={**state.memory, SLOT: memory})
