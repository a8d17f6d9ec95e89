"""What a rollout can do: draw prompts, sample responses, ask the verifier. And the batch that comes of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from jaxrl_llm.policy import Policy
from jaxrl_llm.sharding import by_rows, on_rows
from jaxrl_llm.tasks.task import Task, host_verifier
from jaxrl_llm.types import PADDING, POLICY, Batch, Context, Prompts, PyTree, Rollouts, Sampling, Steer, TrainState


def draw(task: Task, key: Array, n: int) -> Prompts:
    """Training prompts, inside the step.

    Raises:
      ValueError: the task's prompts live on the host.
    """
    if task.draw is None:
        raise ValueError(
            f"task {task.name!r} has no in-graph prompts: pass them, step(state, prompts), from task.batches(seed, n)"
        )
    return task.draw(key, n)


def example(task: Task, n: int) -> PyTree:
    """Shapes and dtypes of a step's prompts."""
    if task.draw is not None:
        return jax.eval_shape(functools.partial(draw, task, n=n), jax.random.key(0))
    assert task.batches is not None  # a task has one or the other
    return jax.eval_shape(lambda x: x, next(iter(task.batches(0, n))))


def sample(
    policy: Policy,
    task: Task,
    budget: int,
    state: TrainState,
    key: Array,
    prompts: Prompts,
    size: int,
    context: Context | None = None,
    sampling: Sampling | None = None,
    length: int | None = None,
    limit: Array | None = None,
    until: Callable[[Array], Array] | None = None,
    own: Array | None = None,
    within: tuple[PyTree, Callable[[Array], Array]] | None = None,
    steer: Steer | None = None,
) -> Rollouts:
    """`World.sample`: groups of `size` responses. Row `(b, g)` has a key of its own, whatever `B` and `size`."""
    b = prompts.index.shape[0]
    if context is None:
        context = jax.tree.map(lambda x: x[:, None], prompts.context)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(fold, in_axes=(0, None))(fold(key, jnp.arange(b)), jnp.arange(size))
    sampling = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, size)), state.sampling if sampling is None else sampling)
    samples = policy.sample(
        policy.whole(state.params),
        keys,
        context,
        sampling,
        length=budget if length is None else length,
        eos=(task.tokenizer.eos_token_id,),
        stop=task.stop,
        limit=limit,
        until=until,
        own=own,
        within=within if within is None else (policy.whole(state.params, within[0]), within[1]),
        steer=steer,
    )
    return Rollouts(
        prompts=prompts,
        context=context,
        tokens=samples.tokens,
        mask=samples.mask,
        role=jnp.where(samples.mask, POLICY, PADDING).astype(jnp.int8),
        logp=samples.logp,
        entropy=samples.entropy,
        version=jnp.broadcast_to(state.step, samples.tokens.shape),
        truncated=samples.truncated,
        sampling=sampling,
    )


def verifier(task: Task, mesh: Mesh | None = None) -> Callable[..., Array]:
    """`(rollouts, *, inside) -> [B G]` float32, NaN (or infinite) where a row cannot be scored.

    A verifier in the graph stays there. One on the host is called back from the program if `inside`, else directly; on
    a mesh the process of each device asks it about the rows that the device holds.
    """
    if task.verify is not None:
        graph = task.verify
        return lambda rollouts, *, inside: _known(rollouts, lambda asked: graph(*asked))
    host = host_verifier(task)

    def call_back(asked: tuple[Prompts, Array, Array]) -> Array:
        def of(*asked: Any) -> Array:
            shape = jax.ShapeDtypeStruct(asked[1].shape[:2], jnp.float32)
            found: Array = jax.pure_callback(host, shape, *asked, vmap_method="sequential")
            return found

        found: Array = by_rows(mesh, of, asked)
        return found

    def call(asked: tuple[Prompts, Array, Array]) -> Array:
        if isinstance(asked[1], jax.core.Tracer):
            raise ValueError("this rollout asks the verifier while it samples: use verify='inside'")
        return on_rows(mesh, host, asked)

    return lambda rollouts, *, inside: _known(rollouts, call_back if inside else call)


def _known(rollouts: Rollouts, ask: Callable[[tuple[Prompts, Array, Array]], Array]) -> Array:
    if rollouts.outcome is not None:
        return rollouts.outcome
    found = ask((rollouts.prompts, rollouts.tokens, rollouts.mask))
    return jnp.where(jnp.isfinite(found), found, jnp.nan)


def batch_of(rollouts: Rollouts, outcome: Array, step: Array) -> tuple[Batch, Array]:
    """The batch before any slot ran, and `[B G]` the rows that have tokens and a score."""
    scored = jnp.isfinite(outcome) & rollouts.scored.any(-1)
    # What stands at padding is whatever the rollout left there.
    rollouts = dataclasses.replace(
        rollouts,
        tokens=jnp.where(rollouts.attended, rollouts.tokens, 0),
        logp=jnp.where(rollouts.mask, rollouts.logp, 0.0),
        entropy=jnp.where(rollouts.mask, rollouts.entropy, 0.0),
    )
    return Batch(rollouts=rollouts, step=step, outcome=jnp.where(scored, outcome, 0.0), keep=scored), scored
