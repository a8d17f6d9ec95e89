"""Bad updates inside the compiled step."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.engine import learner
from jaxrl_llm.guard import guard, is_sound
from jaxrl_llm.types import Stage, TrainState
from jaxrl_llm.updates.optimizer import adamw

SIZE = "loss.terms[0].size"
NAN, INF, HUGE = float("nan"), float("inf"), 1e6


def trouble(scores, batch, *, size):
    """A term of the loss whose gradient is as large as `size`, or not finite."""
    return size * scores.logp


def recipe():
    """With a memory that counts the steps it has seen, and a number that makes trouble."""
    base = algorithms.load("reinforce", group_size=2)
    count = Stage(
        init=lambda problem: jnp.zeros((), jnp.int32),
        apply=lambda memory, key, batch: (batch.rows, memory),
        observe=lambda memory, batch: memory + 1,
    )
    loss = dataclasses.replace(base.loss, terms=(partial(trouble, size=0.0),))
    return dataclasses.replace(base, filter=count, loss=loss)


@pytest.fixture(scope="module")
def plain(policy, letters):
    return learner(recipe(), policy=policy, task=letters, optimizer=adamw(1e-2), prompts_per_step=2)


@pytest.fixture(scope="module")
def guarded(plain):
    """The learner, its step compiled once for all tests, and how often it was traced."""
    parts, traces = guard(plain, max_norm=50.0), []

    def counted(state):
        traces.append(1)
        return parts.step(state)

    return parts, jax.jit(counted), traces


def made(parts, **numbers) -> TrainState:
    state = parts.init(jax.random.key(0))
    return with_size(state, **numbers)


def with_size(state, size=0.0):
    assert SIZE in state.numbers
    return dataclasses.replace(state, numbers={**state.numbers, SIZE: jnp.float32(size)})


def same(a, b, rtol=0.0):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, rtol, 1e-3 * rtol, err_msg=jax.tree_util.keystr(path))


def without_guard(state):
    return dataclasses.replace(state, memory={k: x for k, x in state.memory.items() if k != "guard"})


def test_good_steps_are_the_steps_of_the_learner(plain, guarded):
    step = jax.jit(plain.step)
    a, b = made(plain), made(guarded[0])
    for _ in range(3):
        a, unguarded = step(a)
        b, metrics = guarded[1](b)
        assert metrics.pop("skipped") == 0 and metrics.pop("skipped/total") == 0
        same(metrics, unguarded, rtol=1e-3)  # two programs: they may differ in rounding
    same(without_guard(b), a, rtol=1e-3)


@pytest.mark.parametrize("size", [NAN, INF, HUGE, -HUGE])
def test_a_bad_step_changes_nothing_but_its_number(guarded, size):
    _, step, _ = guarded
    before, _ = step(made(guarded[0]))
    after, metrics = step(with_size(before, size))
    assert metrics["skipped"] == 1 and int(after.memory["guard"]["skipped"]) == 1
    assert not metrics["grad_norm"] <= 50
    same(dataclasses.replace(without_guard(after), step=before.step), without_guard(with_size(before, size)))
    assert int(after.step) == int(before.step) + 1 and int(after.memory["filter"]) == 1

    again, metrics = step(after)
    assert int(again.memory["guard"]["in_a_row"]) == 2 == int(metrics["skipped/total"])
    good, metrics = step(with_size(again))
    assert metrics["skipped"] == 0 and metrics["skipped/total"] == 2
    assert int(good.memory["guard"]["in_a_row"]) == 0 and int(good.memory["filter"]) == 2
    assert any((x != y).any() for x, y in zip(*map(jax.tree.leaves, (good.params, again.params)), strict=True))


def test_the_bound_is_a_number_of_the_state_and_nothing_is_traced_twice(guarded):
    parts, step, traces = guarded
    state = made(parts)
    tight = {**state.memory["guard"], "max_norm": jnp.float32(1e-6)}
    _, metrics = step(dataclasses.replace(state, memory={**state.memory, "guard": tight}))
    assert metrics["skipped"] == 1
    assert len(traces) == 1


def test_parameters_that_are_not_finite_are_not_sound_whatever_the_metrics_say(guarded):
    state = guarded[0].init(jax.random.key(0))
    assert is_sound(state, {"loss": jnp.float32(1)})
    assert not is_sound(state, {"loss": jnp.float32(1), "grad_norm/critic": jnp.float32(3)}, 2.0)
    broken = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), state.params)
    assert not is_sound(dataclasses.replace(state, params=broken), {"loss": jnp.float32(1)})
    frozen = dataclasses.replace(state, params={**state.params, "reference": broken["policy"]})
    assert is_sound(frozen, {"loss": jnp.float32(1)}), "what is not trained is not looked at"


def test_a_bound_that_is_none_is_refused(plain):
    for bound in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match="max_norm must be positive"):
            guard(plain, max_norm=bound)
