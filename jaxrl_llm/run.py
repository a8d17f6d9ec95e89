"""The outer loop: a learner's step, many times."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Learner, Metrics, Prompts, TrainState


def run(
    learner: Learner,
    key: Array | None,
    num_steps: int,
    *,
    state: TrainState | None = None,
    prompts: Iterator[Prompts] | None = None,
    scan: int = 1,
    each: Callable[[int, TrainState, Metrics], Any] | None = None,
) -> tuple[TrainState, Metrics]:
    """Runs a learner; traceable, so `jax.vmap(lambda key: run(learner, key, 100))` runs many seeds at once.

    Args:
      learner: from `engine.learner`.
      key: starts a new run; ignored if `state` is given.
      num_steps: steps to take.
      state: goes on from here. It is donated: do not use it afterwards.
      prompts: one `Prompts` a step, for tasks that live on the host.
      scan: steps per compiled program (`lax.scan`); must divide `num_steps`. Faster when a step is short.
      each: called on the host after every program, `each(steps_done, state, metrics)`; metrics are `[scan]`.
        The state it is given is donated to the next step: copy what you keep.

    Returns:
      the final state and the metrics, each with leading axis `num_steps`.

    Raises:
      ValueError: neither key nor state; `scan` does not divide `num_steps`, or is combined with a verifier between
        programs.
    """
    if state is None:
        if key is None:
            raise ValueError("run needs a key to start from, or a state to go on from")
        state = learner.init(key)
    if num_steps % scan:
        raise ValueError(f"scan ({scan}) must divide num_steps ({num_steps})")
    if scan > 1 and not learner.compiled:
        raise ValueError("scan needs the step to be one program: build the learner with verify='inside'")

    # Under a transformation (vmap of whole runs) there is nothing to donate.
    step = _program(learner, scan, donate=not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state)))
    history = []
    for done in range(0, num_steps, scan):
        batch = None if prompts is None else _stack([next(prompts) for _ in range(scan)])
        state, metrics = step(state, batch)
        history.append(metrics)
        if each is not None:
            each(done + scan, state, metrics)
    return state, jax.tree.map(lambda *xs: jnp.concatenate(xs), *history) if history else {}


@functools.lru_cache(maxsize=32)
def _program(learner: Learner, scan: int, donate: bool) -> Callable[..., tuple[TrainState, Metrics]]:
    """`scan` steps as one function; cached, so that running a learner again compiles nothing."""

    def several(state: TrainState, prompts: Prompts | None) -> tuple[TrainState, Metrics]:
        return jax.lax.scan(learner.step, state, prompts, length=scan)

    def one(state: TrainState, prompts: Prompts | None) -> tuple[TrainState, Metrics]:
        prompts = None if prompts is None else jax.tree.map(lambda x: x[0], prompts)
        state, metrics = learner.step(state, prompts)
        return state, jax.tree.map(lambda x: x[None], metrics)

    function = several if scan > 1 else one
    if not learner.compiled:
        return function
    return jax.jit(function, donate_argnums=0 if donate else ())


def _stack(batches: list[Prompts]) -> Prompts:
    stacked: Prompts = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    return stacked
