"""DRIVE: many prompts with few rollouts, then few hard prompts with many."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.choose import successes
from jaxrl_llm.rollouts.ragged import sample_ragged
from jaxrl_llm.stats import first
from jaxrl_llm.types import Batch, Problem, Prompts, Rollouts, Stage, World

Pool = dict[str, Any]  # the hardest prompts so far, their pass rates, which are still trained on, and the step

UNKNOWN = 2.0  # above every pass rate


def empty_pool(problem: Problem, *, keep: tuple[int, ...]) -> Pool:
    """Room for as many prompts as the first phase keeps; a place without a prompt has the pass rate `UNKNOWN`."""
    example = dataclasses.replace(problem.example, logged=None)
    blank = jax.tree.map(lambda x: jnp.zeros((keep[0], *x.shape[1:]), x.dtype), example)
    none = jnp.zeros(keep[0], bool)
    return {"prompts": blank, "rate": jnp.full(keep[0], UNKNOWN), "alive": none, "step": jnp.zeros((), jnp.int32)}


def from_pool(memory: Pool, key: Array, prompts: Prompts, *, start: int) -> tuple[Prompts, Pool]:
    """The drawn prompts before step `start`; then survivors in random order, repeated if they are fewer."""
    alive, n = memory["alive"], prompts.index.shape[0]
    order = jnp.argsort(jnp.where(alive, jax.random.uniform(key, alive.shape), jnp.inf))
    rows = order[jnp.arange(n) % jnp.maximum(alive.sum(), 1)]
    hard = (memory["step"] >= start) & alive.any()
    drawn = dataclasses.replace(prompts, logged=None)
    return jax.tree.map(lambda old, new: jnp.where(hard, old[rows], new), memory["prompts"], drawn), memory


def by_stage(world: World, key: Array, prompts: Prompts, *, start: int, few: int, many: int) -> Rollouts:
    """Groups of `few` before step `start`, then of `many`."""
    sizes = jnp.broadcast_to(jnp.where(world.step < start, few, many), prompts.index.shape)
    return sample_ragged(world, key, prompts, sizes, largest=max(few, many))


def measured(prompts: Prompts, batch: Batch) -> tuple[Array, Array]:
    """Of each prompt whether the batch has it, and its pass rate there (`UNKNOWN` if no row counts), `[N]`."""
    right, rows = successes(batch)
    same = (prompts.index[:, None] == batch.prompts.index) & (rows > 0)
    total = jnp.where(same, rows, 0).sum(-1)
    return same.any(-1), jnp.where(total > 0, jnp.where(same, right, 0).sum(-1) / jnp.maximum(total, 1), UNKNOWN)


def hardest(memory: Pool, batch: Batch, *, starts: tuple[int, ...], keep: tuple[int, ...]) -> Pool:
    """The pool with this step's pass rates and, in the first stage, its prompts, cut down to what the phase keeps."""
    pool, index = memory["prompts"], batch.prompts.index
    (again, rate), (seen, new_rate) = measured(pool, batch), measured(batch.prompts, batch)
    rate = jnp.where(again & (memory["rate"] < UNKNOWN), rate, memory["rate"])
    held = ((index[:, None] == pool.index) & (rate < UNKNOWN)).any(-1)
    enters = seen & ~held & first(index, seen) & (batch.step < starts[0])
    both = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), pool, batch.prompts)
    rates = jnp.concatenate([rate, jnp.where(enters, new_rate, UNKNOWN)])
    alive = jnp.concatenate([memory["alive"], enters])
    order = jnp.lexsort((both.index, rates, ~alive))[: keep[0]]
    step = batch.step + 1
    limit = jnp.array(keep)[jnp.sum(step >= jnp.array(starts[1:]))]
    return {
        "prompts": jax.tree.map(lambda x: x[order], both),
        "rate": rates[order],
        "alive": alive[order] & (jnp.arange(keep[0]) < limit),
        "step": step,
    }


def drive(
    *,
    first_group_size: int = 8,
    group_size: int = 64,
    steps: tuple[int, ...] = (32, 64, 32),
    keep: tuple[int, ...] = (72, 50, 25),
) -> Algorithm:
    """`grpo` on all prompts in small groups, then in large groups on the hardest, of which every phase keeps fewer.

    Source: DRIVE, two-stage training with Pre-GRPO, 2511.06307.
    Deviations: the hard prompts are those of the first stage with the lowest pass rates, where the paper has a second
      data set of 175; pass rates are those of a prompt's last group, not measured anew before a phase. One response
      length (the paper has 24k tokens, then 32k). The settings of `grpo` are its own.
    Limit: in the first stage it is `grpo` with groups of first_group_size.
    Family: sampling and curricula.

    Args:
      first_group_size: rollouts a prompt in the first stage.
      group_size: rollouts a prompt on the hard prompts; all groups are padded to the larger size.
      steps: of the first stage and of every phase but the last, which has 32 in the paper.
      keep: prompts of each phase, fewer each time.

    Raises:
      ValueError: phases that do not fit each other.
    """
    if len(steps) != len(keep) or list(keep) != sorted(keep, reverse=True) or min(*steps, *keep) < 1:
        raise ValueError(f"drive needs as many `steps` as phases, each with no more to `keep`: got {steps}, {keep}")
    starts = tuple(accumulate(steps))
    return dataclasses.replace(
        grpo(),
        prompt=Stage(
            init=partial(empty_pool, keep=keep),
            apply=partial(from_pool, start=starts[0]),
            observe=partial(hardest, starts=starts, keep=keep),
        ),
        rollout=partial(by_stage, start=starts[0], few=first_group_size, many=group_size),
    )
