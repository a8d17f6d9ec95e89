"""SPARK: the policy learns to judge its own answers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.judging import Answer, Tasks, Words, after, says, tasks_of
from jaxrl_llm.rollouts.resume import buffer
from jaxrl_llm.stages import through
from jaxrl_llm.types import Batch, Learn, Problem, Prompts, Stage, split
from jaxrl_llm.updates.queue import Queue, empty, pop, push

LABELS = Words(right=(1,), wrong=(2,), first=(1,), second=(2,))


def no_tasks(problem: Problem, *, size: int, make: Any) -> Queue:
    """A queue of `2 * size` tasks: of fewer than `size` that wait and as many that a step adds."""
    rollouts = buffer(problem, groups=problem.prompts, size=1)
    batch = Batch(rollouts=rollouts, step=jnp.zeros((), jnp.int32), outcome=jnp.zeros((problem.prompts, 1)))
    return empty(jax.eval_shape(make, batch, jax.random.key(0)), 2 * size)


def answered(learn: Learn, models: Any, key: Array, tasks: Tasks, *, parent: Algorithm, answer: Answer) -> Batch:
    """The current policy's responses to the tasks, with the parent's credit, judged by label or by the verifier."""
    keys, world = split(key, "sample", "credit"), learn.world(models)
    prompts = Prompts(context=tasks.context, index=tasks.index, target=tasks.target)
    rollouts = parent.rollout(world, keys["sample"], prompts)  # type: ignore[operator]
    label, size = tasks.label[:, None], tasks.size[:, None]
    said = says(rollouts.tokens, answer(rollouts.tokens, rollouts.mask), label, size)
    outcome = jnp.where(size > 0, said.astype(jnp.float32), world.reward(rollouts))
    return through(parent, learn.batch(models, replace(rollouts, outcome=outcome)), keys["credit"])


def then_judge(
    queue: Queue,
    key: Array,
    models: Any,
    batch: Batch,
    learn: Learn,
    *,
    parent: Algorithm,
    size: int,
    make: Any,
    answer: Answer,
) -> tuple[Any, Queue]:
    """The parent's update; then, once `size` tasks wait, a second one on the oldest of them."""
    keys = split(key, "first", "make", "second")
    models, metrics = parent.update(keys["first"], models, batch, learn)  # type: ignore[operator]
    queue = push(queue, tasks := make(batch, keys["make"]), tasks.there)
    full = queue[1] >= size
    oldest, left = pop(queue, size, where=full)

    def second(models: Any) -> Any:
        auxiliary = answered(learn, models, keys["second"], oldest, parent=parent, answer=answer)
        models, found = learn(models, auxiliary)
        return models, {"loss": found["loss"], "outcome": auxiliary.outcome.mean()}

    def none(models: Any) -> Any:
        return models, {"loss": jnp.zeros(()), "outcome": jnp.zeros(())}

    models, found = jax.lax.cond(full, second, none, models)
    return (models, metrics | {f"judging/{name}": x for name, x in found.items()}), left


def spark(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float | None = 0.001,
    size: int = 64,
    pointwise: float = 0.3,
    words: Words = LABELS,
    marker: tuple[int, ...] = (),
) -> Algorithm:
    """`grpo`, and a second update on prompts made of its verified responses, so that policy and judge grow together.

    Is this answer right, which of two is, and what is the answer if this one is wrong: the labels are known.

    Source: "SPARK: Synergistic Policy And Reward Co-Evolving Framework", 2509.22624, and its released trainer.
    Deviations: the wording is token ids that the user gives. A judge's final answer is right if it is the label and at
      most one more token, the end. The second update is one optimiser step.
    Limit: with size=0 it is `grpo`.
    Family: rewards and budgets.

    Args:
      group_size: responses a prompt, auxiliary ones included.
      clip: both widths.  # not in the paper
      kl: weight of the divergence from the reference.
      size: auxiliary prompts of a second update; at most half as many judgements and as many reflections come of a
        step, and what is not used waits for the next.
      pointwise: of the groups with right and wrong answers, how many are judged one answer at a time.
      words: ids of the text around, and of what a judge says.  # the ids are not in the paper
      marker: ids of the text that a final answer follows; () for the whole response.  # () not in the paper

    Raises:
      ValueError: an odd or negative size, or labels that are empty or the same.
    """
    if size < 0 or size % 2:
        raise ValueError(f"spark: size must be even and not negative, half judgements and half reflections, got {size}")
    if not all(words[:4]) or words.right == words.wrong or words.first == words.second:
        raise ValueError(f"spark: the labels in words must be some tokens, and differ by pairs, got {words[:4]}")
    parent, answer = grpo(group_size=group_size, clip=clip, kl=kl), partial(after, marker=marker)
    make = partial(tasks_of, words=words, answer=answer, pointwise=pointwise, most=size // 2)
    update = partial(then_judge, parent=parent, size=size, make=make, answer=answer)
    return replace(parent, update=Stage(init=partial(no_tasks, size=size, make=make), apply=update)) if size else parent
