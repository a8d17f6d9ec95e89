"""Updates near the best policy so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Learn, Metrics, Problem
from jaxrl_llm.updates.passes import several_passes

Memory = dict[str, Array]


def no_best(problem: Problem) -> Memory:
    """No reward is known, and none was worse."""
    return {"reward": jnp.zeros(()), "known": jnp.zeros((), bool), "worse": jnp.zeros((), bool)}


def judged(memory: Memory, batch: Batch, *, every: int) -> tuple[Memory, Array]:
    """The memory with the mean reward of every `every`-th step, and whether it is the best so far, `[]` bool."""
    mean = masked_mean(batch.outcome if batch.reward is None else batch.reward, batch.rows)
    due = (batch.step % every == 0) & batch.rows.any()
    best = due & (~memory["known"] | (mean > memory["reward"]))
    reward = jnp.where(best, mean, memory["reward"])
    return {"reward": reward, "known": memory["known"] | due, "worse": memory["worse"] | (due & ~best)}, best


def near_the_best(
    memory: Memory,
    key: Array,
    models: Any,
    batch: Batch,
    learn: Learn,
    *,
    loss: Callable[..., Any],
    weight: float | Array,
    bound: float | Array,
    every: int,
    updates: int,
) -> tuple[tuple[Any, Metrics], Memory]:
    """`updates` passes, held to the best policy so far once a judged one was worse.

    A pass that finds the divergence above `bound` changes nothing, and doubles its weight for those after it.

    Args:
      memory: what was judged so far.
      key: of the passes.
      models: parameters by role, and optimiser states; the reference is the best policy so far.
      batch: with the reference's log-probs.
      learn: takes a step.
      loss: `(Scores, Batch, *, weight) -> (scalar, metrics)`, with the metric `kl`.
      weight: of the divergence, once a policy was judged and was not better.
      bound: of the divergence.
      every: steps between two judgements.
      updates: passes.

    Raises:
      ValueError: the reference was not scored.
    """
    memory, best = judged(memory, batch, every=every)
    if batch.reference is None or batch.reference.logp is None:
        raise ValueError("near_the_best needs batch.reference.logp: the recipe's loss must read it")
    # The policy that sampled is the best: its log-probs are those of the rollouts.
    known = jnp.where(best, batch.rollouts.logp, batch.reference.logp)
    batch = replace(batch, reference=replace(batch.reference, logp=known))
    params = models[0]
    reference = jax.tree.map(lambda new, old: jnp.where(best, new, old), params["policy"], params["reference"])

    def step(state: tuple[Any, Array], part: Batch) -> tuple[tuple[Any, Array], Metrics]:
        old, beta = state
        new, metrics = learn(old, part, partial(loss, weight=beta))
        far = memory["worse"] & (metrics["kl"] > bound)
        kept = jax.tree.map(lambda a, b: jnp.where(far, a, b), old, new)
        return (kept, jnp.where(far, 2 * beta, beta)), {**metrics, "skipped": far.astype(jnp.float32)}

    beta = jnp.where(memory["worse"], weight, 0.0)
    start = (({**params, "reference": reference}, models[1]), beta)
    (models, _), metrics = several_passes(key, start, batch, step, epochs=updates)
    return (models, metrics), memory
