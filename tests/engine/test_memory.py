"""Stages: memory by prompt, written by its own slot alone, seen by the next step."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import chain
from jaxrl_llm.engine import learner
from jaxrl_llm.types import Stage


def counts(problem):
    return jnp.zeros(problem.rows)


def minus_visits(memory, key, batch, *, scale):
    """The reward minus how often each prompt was seen before this step."""
    return batch.outcome - scale * memory[batch.prompts.index][:, None], memory


def count(memory, batch):
    return memory.at[batch.prompts.index].add(1.0)


def halved(batch):
    return 0.5 * batch.reward


def test_memory_is_indexed_by_prompt_and_chains_read_what_came_before(policy, letters):
    visits = Stage(init=counts, apply=partial(minus_visits, scale=1.0), observe=count)
    recipe = dataclasses.replace(algorithms.load("reinforce", group_size=2), reward=chain(visits, halved))
    parts = learner(recipe, policy=policy, task=letters, prompts_per_step=4)
    state = parts.init(jax.random.key(0))
    assert float(state.numbers["reward.stages[0].apply.scale"]) == 1.0
    step = jax.jit(parts.step)
    seen = np.zeros(letters.rows)
    prompts = letters.draw(jax.random.key(1), 4)
    for visit in range(3):
        state, metrics = step(state, prompts)
        np.add.at(seen, np.asarray(prompts.index), 1)
        np.testing.assert_array_equal(state.memory["reward"][0], seen)
        before = (seen - np.bincount(np.asarray(prompts.index), minlength=letters.rows))[np.asarray(prompts.index)]
        expected = 0.5 * (float(metrics["accuracy"]) - before.mean())
        np.testing.assert_allclose(metrics["reward/mean"], expected, rtol=1e-5, atol=1e-6, err_msg=str(visit))
