"""The compiled step: one program, one trace, the same numbers however it is run."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.adjust import adjust
from jaxrl_llm.algorithm import numbers
from jaxrl_llm.engine import learner
from jaxrl_llm.models.heads import critic
from jaxrl_llm.run import run
from jaxrl_llm.types import Sampling
from jaxrl_llm.updates.optimizer import adamw

STEPS = 4


@pytest.fixture(scope="module")
def build(policy, letters, tiny):
    return partial(
        learner,
        policy=policy,
        task=letters,
        critic=critic(tiny),
        optimizer=adamw(1e-2),
        prompts_per_step=4,
    )


@pytest.fixture(scope="module")
def grpo(build):
    return build(algorithms.load("grpo", group_size=4))


@pytest.fixture(scope="module")
def history(grpo):
    return run(grpo, jax.random.key(0), STEPS)


@pytest.fixture(scope="module")
def lowered(grpo):
    return jax.jit(grpo.step).lower(jax.eval_shape(grpo.init, jax.random.key(0)))


@pytest.fixture(scope="module")
def program(lowered):
    return lowered.compile()


def assert_same(a, b, **tolerance):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def test_nothing_returns_to_the_host_for_a_task_in_the_graph(lowered, program):
    text = lowered.as_text() + program.as_text()
    assert "callback" not in text and "infeed" not in text and "outfeed" not in text


def test_the_search_for_callbacks_would_find_one(build, letters):
    host = dataclasses.replace(letters, verify=None)
    text = jax.jit((step := build(algorithms.load("grpo", group_size=4), task=host)).step).lower(
        jax.eval_shape(step.init, jax.random.key(0))
    )
    assert "callback" in text.as_text()


def test_traces_once_over_steps_and_over_changed_numbers(build):
    parts = build(
        algorithms.load("grpo", group_size=4),
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    )
    traces = 0

    def counted(state):
        nonlocal traces
        traces += 1
        return parts.step(state)

    step = jax.jit(counted)
    state, first = step(parts.init(jax.random.key(0)))
    for change in ({"temperature": 0.5}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.1}):
        state, _ = step(adjust(state, sampling=change))
    state, _ = step(adjust(state, learning_rate=1e-3))
    state, last = step(adjust(state, numbers={"loss.surrogate.low": 0.1}))
    assert traces == 1
    assert jax.tree.structure(first) == jax.tree.structure(last)


def test_a_changed_number_changes_the_step(grpo, program):
    state, _ = run(grpo, jax.random.key(0), 2)
    plain = program(state)[1]
    assert float(program(adjust(state, numbers={"loss.terms[0].weight": 50.0}))[1]["loss"]) != float(plain["loss"])
    cold = program(adjust(state, sampling={"temperature": 0.1}))[1]
    assert float(cold["entropy"]) < 0.95 * float(plain["entropy"])
    with pytest.raises(KeyError, match=r"it has .*loss\.terms\[0\]\.weight"):
        adjust(state, numbers={"kl": 1.0})
    with pytest.raises(ValueError, match="top_p is not in the program"):
        adjust(state, sampling={"top_p": 0.9})


def test_scan_equals_loop(grpo, history):
    """To the last ulp or so: they are two programs."""
    assert_same(run(grpo, jax.random.key(0), STEPS, scan=STEPS), history, rtol=1e-6, atol=1e-8)


def test_same_key_same_run_to_the_last_bit(grpo, history):
    assert_same(run(grpo, jax.random.key(0), STEPS), history, rtol=0, atol=0)


def test_another_key_another_run(grpo, history):
    other = run(grpo, jax.random.key(1), STEPS)[1]
    assert not np.allclose(other["entropy"], history[1]["entropy"])


def test_stopping_and_going_on_changes_nothing(grpo, history):
    state, first = run(grpo, jax.random.key(0), 2)
    state, second = run(grpo, None, STEPS - 2, state=state)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    assert_same((state, both), history, rtol=0, atol=0)


def test_vmap_over_seeds_equals_single_runs(grpo, history):
    many = jax.jit(jax.vmap(lambda seed: run(grpo, jax.random.key(seed), STEPS, scan=STEPS)))(np.arange(2))
    one = jax.jit(lambda i: jax.tree.map(lambda x: x[i], many))
    assert_same(one(0), history, rtol=1e-4, atol=1e-6)
    assert_same(one(1), run(grpo, jax.random.key(1), STEPS), rtol=1e-4, atol=1e-6)


def test_vmap_over_numbers_equals_single_runs(build):
    def metrics(clip, kl, rate):
        parts = build(algorithms.load("grpo", group_size=4, clip=clip, kl=kl), optimizer=adamw(rate))
        return run(parts, jax.random.key(0), 2, scan=2)[1]

    values = np.array([[0.01, 0.3], [0.3, 0.01], [0.01, 0.02]], np.float32)
    many, single = jax.tree.map(np.asarray, jax.jit(jax.vmap(metrics))(*values)), jax.jit(metrics)
    for i, each in enumerate(values.T):
        assert_same(jax.tree.map(lambda x, i=i: x[i], many), single(*each), rtol=1e-4, atol=1e-6)
    # One on-policy update never reaches the clip; the others are felt in the second step.
    assert not np.allclose(many["grad_norm"][0, 1], many["grad_norm"][1, 1], rtol=1e-6)


def test_numbers_of_a_recipe_are_in_the_state(grpo):
    state = grpo.init(jax.random.key(0))
    assert set(state.numbers) == set(numbers(algorithms.load("grpo")))


@pytest.mark.parametrize("verify", ["inside", "between"])
def test_a_verifier_on_the_host_gives_the_same_run(build, letters, history, verify):
    host = dataclasses.replace(letters, verify=None)
    parts = build(algorithms.load("grpo", group_size=4), task=host, verify=verify)
    assert_same(run(parts, jax.random.key(0), STEPS), history, rtol=1e-5, atol=1e-7)


def test_rows_the_verifier_cannot_score_count_nowhere(build, letters):
    def sometimes(prompts, tokens, mask):
        score = letters.verify(prompts, tokens, mask)
        return jnp.where(jnp.arange(4) == 0, jnp.nan, score)

    odd = build(algorithms.load("grpo", group_size=4), task=dataclasses.replace(letters, verify=sometimes))
    _, metrics = run(odd, jax.random.key(0), 2)
    np.testing.assert_allclose(metrics["unscored_rows"], 0.25)
    np.testing.assert_allclose(metrics["kept_rows"], 0.75)
    assert all(np.isfinite(x).all() for x in metrics.values())


def test_sampled_and_recomputed_log_probs_agree(history):
    assert float(history[1]["gap/max"].max()) < 1e-5
    assert np.allclose(history[1]["ratio/mean"], 1.0, atol=1e-5)


def test_a_reference_nobody_reads_is_neither_kept_nor_computed(build):
    def cost(kl):
        parts = build(algorithms.load("grpo", group_size=4, kl=kl))
        state = jax.eval_shape(parts.init, jax.random.key(0))
        return set(state.params), jax.jit(parts.step).lower(state).cost_analysis()["flops"]

    with_reference, without, zero = cost(0.04), cost(None), cost(0.0)
    assert with_reference[0] == {"policy", "reference"}
    assert without[0] == zero[0] == {"policy"}
    assert without[1] == zero[1] < with_reference[1]


def test_a_critic_is_kept_only_by_recipes_that_read_it(build):
    state = jax.eval_shape(build(algorithms.load("ppo")).init, jax.random.key(0))
    assert set(state.params) == {"policy", "critic"} == set(state.opt_state)
    assert set(jax.eval_shape(build(algorithms.load("grpo")).init, jax.random.key(0)).params) == {"policy", "reference"}


def test_a_recipe_that_reads_values_says_so_without_a_critic(build):
    with pytest.raises(ValueError, match=r"critic=heads\.critic"):
        build(algorithms.load("ppo"), critic=None)


def test_numbers_that_do_not_fit_are_named(build):
    with pytest.raises(ValueError, match="4 prompts do not divide into 3 micro-batches"):
        run(build(algorithms.load("grpo", group_size=4), accumulate=3), jax.random.key(0), 1)
    with pytest.raises(ValueError, match="verify must be"):
        build(algorithms.load("grpo"), verify="later")
