"""What holds for every method of the catalogue, found by looking in algorithms/."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from law_settings import INSTEAD, SMALL
from recurrent import recurrent

from jaxrl_llm import algorithms, checkpoint, sharding
from jaxrl_llm.algorithm import Algorithm, describe
from jaxrl_llm.engine import learner
from jaxrl_llm.evaluate import evaluator
from jaxrl_llm.models.heads import critic
from jaxrl_llm.policy import language_model
from jaxrl_llm.run import run
from jaxrl_llm.types import Learner
from jaxrl_llm.updates.optimizer import adamw

STEPS = 3
SEED = jax.random.key(0)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", algorithms.names(), scope="module")


@pytest.fixture(scope="module")
def recipe(name):
    return algorithms.load(name, **SMALL.get(name, {}))


@pytest.fixture(scope="module")
def task(letters):
    """Letters whose rewards are multiplied by the prompt's target; NaN, not to be scored, where that is NaN."""

    def verify(prompts, tokens, mask):
        return prompts.target[:, None] * letters.verify(prompts, tokens, mask)

    def demonstrate(key, prompts):
        logged = letters.demonstrate(key, prompts)
        return dataclasses.replace(logged, reward=jnp.nan_to_num(prompts.target)[:, None] * logged.reward)

    def draw(key, n):
        return dataclasses.replace(letters.draw(key, n), target=jnp.ones(n))

    return dataclasses.replace(letters, verify=verify, demonstrate=demonstrate, draw=draw)


@pytest.fixture(scope="module")
def model(letters):
    return recurrent(len(letters.tokenizer))


@pytest.fixture(scope="module")
def build(recipe, model, task):
    def build(**changed):
        options = {
            "policy": language_model(model),
            "task": task,
            "critic": critic(model),
            "optimizer": adamw(3e-2, max_norm=1e6),
            "critic_optimizer": adamw(1e-2),
            "prompts_per_step": 8,
        }
        return learner(recipe, **(options | changed))

    return build


@pytest.fixture(scope="module")
def traces():
    """One entry for every time the step was traced."""
    return []


@pytest.fixture(scope="module")
def parts(build, traces, forget_programs):
    init, step, compiled = build()

    def counted(state, prompts=None):
        traces.append(1)
        return step(state, prompts)

    yield Learner(init, counted, compiled)
    forget_programs()  # before the next method's


@pytest.fixture(scope="module")
def first_run(parts, traces, task):
    """Final state, metrics, and how often the step was traced for them."""
    before = len(traces)
    return *run(parts, SEED, STEPS, prompts=drawn(task)), len(traces) - before


@pytest.fixture(scope="module")
def history(first_run):
    return first_run[:2]


def assert_same(a, b, **tolerance):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if tolerance["rtol"] and "preference/accuracy" in jax.tree_util.keystr(path):
            continue  # at the reference all pairs tie, and rounding decides
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_allclose(x, y, err_msg=jax.tree_util.keystr(path), **tolerance)


def drawn(task):
    """Prompts of every step, the same for all runs: handed in, so that a test may change them without a new program."""
    return (task.draw(jax.random.fold_in(SEED, i), 8) for i in itertools.count())


def fresh(x):
    """As `init` makes it: on no device in particular, which is the same program."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(fresh(jax.random.key_data(x)))
    return jnp.asarray(np.asarray(x))


def kind(x):
    return x.shape, x.dtype, getattr(x, "weak_type", False)


def test_is_a_recipe_with_a_source(name, recipe):
    assert isinstance(recipe, Algorithm)
    assert describe(recipe).startswith("Algorithm(")
    function = algorithms.recipe(name)
    assert function.__name__ == name
    assert all(
        p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in inspect.signature(function).parameters.values()
    )
    doc = inspect.getdoc(function)
    assert "Source:" in doc and "Deviations:" in doc and "Limit:" in doc
    assert len(inspect.getsource(inspect.getmodule(function)).splitlines()) <= 120


def test_its_state_has_shapes_before_it_has_numbers(parts, history):
    abstract = jax.eval_shape(parts.init, SEED)
    assert jax.tree.structure(abstract) == jax.tree.structure(history[0])


def test_traces_once_and_keeps_structure_and_dtypes(parts, first_run, traces, task):
    state, _, traced = first_run
    before = len(traces)
    run(parts, jax.random.key(5), STEPS, prompts=drawn(task))
    assert traced == 1 and len(traces) == before
    assert jax.tree.map(kind, parts.init(SEED)) == jax.tree.map(kind, state)


def test_metrics_are_finite_scalars_and_the_policy_moves(parts, history):
    state, metrics = history
    assert all(x.shape == (STEPS,) and np.isfinite(x).all() for x in metrics.values()), metrics
    start = parts.init(SEED).params["policy"]
    assert any(
        (a != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(state.params["policy"]), strict=True)
    )


def test_finite_on_extreme_rewards(parts, task):
    """Rewards of a million either way, or all equal, and a group that cannot be scored: nothing becomes NaN."""
    state = parts.init(SEED)
    for scale in (1e6, -1e6, 0.0):
        prompts = dataclasses.replace(task.draw(SEED, 8), target=jnp.full(8, scale, jnp.float32).at[0].set(jnp.nan))
        state, metrics = run(parts, None, 1, state=state, prompts=iter([prompts]))
        for path, x in jax.tree.leaves_with_path((state.params, state.memory, metrics)):
            where = jax.tree_util.keystr(path)
            # A response that goes on keeps its prompt, with the target this test made NaN.
            assert np.isfinite(x).all() or where.endswith(".target"), (scale, where)


def test_resumes_to_the_last_bit(parts, history, task, tmp_path):
    state, _ = run(parts, SEED, 1, prompts=drawn(task))
    checkpoint.save(tmp_path / "state", state)
    state = checkpoint.load(tmp_path / "state", jax.eval_shape(parts.init, SEED))
    rest = itertools.islice(drawn(task), 1, None)
    state, metrics = run(parts, None, STEPS - 1, state=jax.tree.map(fresh, state), prompts=rest)
    assert_same((state, metrics), (history[0], jax.tree.map(lambda x: x[1:], history[1])), rtol=0, atol=0)


def test_two_seeds_at_once_on_eight_devices_are_two_runs(build, parts, history, task, monkeypatch):
    """Devices share prompts, weights and vocabulary (2 x 2 x 2), and the stages' memory, however small it is."""
    monkeypatch.setattr(sharding, "LARGE", 0)
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    state = sharding.place_state(mesh, jax.vmap(parts.init)(jnp.stack([jax.random.key(1), SEED])))
    where = jax.tree.map(lambda x: x.sharding, state)
    assert not all(jax.tree.leaves(jax.tree.map(lambda x: x.sharding.is_fully_replicated, state.params["policy"])))
    step = jax.jit(jax.vmap(build(mesh=mesh).step, in_axes=(0, None)), out_shardings=(where, None))
    seen = []
    for prompts in itertools.islice(drawn(task), STEPS):
        state, metrics = step(state, prompts)
        seen.append(jax.tree.map(lambda x: x[1], metrics))
    assert_same(jax.tree.map(lambda *xs: jnp.stack(xs), *seen), history[1], rtol=1e-3, atol=1e-5)


def test_learns_its_toy_task(name, parts, model, letters, task):
    evaluate = evaluator(language_model(model), letters, problems=128)
    start = evaluate(parts.init(SEED).params["policy"]).reward
    state, metrics = run(parts, SEED, 60, prompts=drawn(task))
    if name in INSTEAD:
        metric, bound = INSTEAD[name]
        assert metrics[metric][-1] < bound < metrics[metric][0], (metric, metrics[metric])
        return
    reached = evaluate(state.params["policy"]).reward
    assert reached > max(0.8, start + 0.2), (start, reached)
