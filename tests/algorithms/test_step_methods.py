"""Methods that change the optimiser step: PIPO, N-PG-IGT, HARPG, Bayesian policy gradient, AEPO and Deep GA."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import world as outside
from jaxrl_llm.algorithms import load, pipo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.testing import evaluate, prepare, random_batch, whole_step
from jaxrl_llm.types import Learn, Problem, Sampling, Scores
from jaxrl_llm.updates.passes import several_passes

KEY = jax.random.key(0)
CLIP = partial(clip_min, low=0.2, high=0.2)


def table(params, batch):
    """The scores of a policy whose log-probs are its parameters, `[P G T]`."""
    return Scores(logp=params[batch.prompts.index])


def softmax(params, batch):
    """The scores of a policy whose logits at position `t` are its parameters `[T V]`, whatever came before."""
    logp = jax.nn.log_softmax(params)[jnp.arange(batch.mask.shape[-1]), batch.rollouts.tokens]
    return Scores(logp=jnp.where(batch.mask, logp, 0.0))


def fake_learn(loss, score=table, *, rate=0.5, world=None):
    """What an update is given, for such a policy and gradient descent."""

    def objective(models, batch, other=None):
        terms = other or loss
        batch = whole_step(terms, score(models[0]["policy"], batch), batch)
        return lambda trained: terms(score(trained["policy"], batch), batch)

    def gradient(models, batch, other=None):
        of = objective(models, batch, other)
        (value, _), slopes = jax.value_and_grad(of, has_aux=True)({"policy": models[0]["policy"]})
        return (value, {"loss": value}), slopes

    def step(models, batch, other=None):
        (_, metrics), slopes = gradient(models, batch, other)
        return ({"policy": models[0]["policy"] - rate * slopes["policy"]}, models[1]), metrics

    def fresh(models, rollouts):
        return outside.batch_of(rollouts, rollouts.outcome, jnp.asarray(7))[0]

    return Learn(step=step, objective=objective, gradient=gradient, world=world, batch=fresh)


def changed(name, *, loss=None, **kwargs):
    parent = load(name, **kwargs)
    return dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, **(loss or {})))


def same_loss(child, parent, scores, batch, factor=1.0):
    batches = [prepare(a, batch) for a in (child, parent)]
    got, want = (evaluate(a.loss, scores, b) for a, b in zip((child, parent), batches, strict=True))
    np.testing.assert_allclose(got.value, factor * want.value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.coefficient, factor * want.coefficient, rtol=1e-4, atol=1e-7)
    assert (got.coefficient != 0).any()


# --- PIPO -----------------------------------------------------------------------------------------------------------

WINDOW = jnp.array([0.2, 0.25, 0.3, 0.25, 0.3, 0.35, 0.3, 0.25])


@pytest.mark.parametrize(("mean", "xi"), [(0.45, 4.041452), (0.15, -2.886751), (0.275, 0.0)])
def test_pipo_improvement_by_hand(mean, xi):
    np.testing.assert_allclose(pipo.improvement(jnp.array(mean), WINDOW, jnp.array(8)), xi, rtol=1e-5, atol=1e-5)
    # Older places of the window, not yet written, do not count; neither do more means than it holds.
    np.testing.assert_allclose(
        pipo.improvement(jnp.array(0.45), WINDOW, jnp.array(11)),
        pipo.improvement(jnp.array(0.45), WINDOW, jnp.array(8)),
    )
    longer = jnp.append(jnp.full(3, jnp.nan), WINDOW)
    np.testing.assert_allclose(pipo.improvement(jnp.array(mean), longer, jnp.array(8)), xi, rtol=1e-5, atol=1e-5)


def test_pipo_improvement_over_equal_means_is_bounded():
    same = jnp.full(8, 1 / 3)
    np.testing.assert_allclose(pipo.improvement(jnp.array(0.5), same, jnp.array(8)), 1 / 6, rtol=1e-5)
    assert pipo.improvement(jnp.array(90.0), same, jnp.array(8)) == 5


def test_pipo_credit_has_mean_size_one():
    rows = jnp.ones((4, 2), bool)
    advantage = jnp.broadcast_to(jnp.array([1.5, -0.5, -0.5, -0.5])[:, None], (4, 2))
    got = pipo.of_size_one(advantage, rows)
    np.testing.assert_allclose(got[:, 0], [2, -2 / 3, -2 / 3, -2 / 3], rtol=1e-5)
    np.testing.assert_allclose(4.041452 * got[:2, 1], [8.082901, -2.694300], rtol=1e-5)
    assert not pipo.of_size_one(jnp.zeros((4, 2)), rows).any()
    ragged = jnp.array([[1, 1], [1, 0], [0, 0], [1, 1]], bool)
    clean, dirty = (pipo.of_size_one(jnp.where(ragged, advantage, x), ragged) for x in (0.0, jnp.nan))
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_allclose(clean[:, 0], [1.8, -0.6, 0, -0.6], rtol=1e-5)  # three rows: 3 / 2.5


def problem(batch):
    p, _, t = batch.mask.shape
    example = jax.eval_shape(lambda x: x, batch.prompts)
    sampling = Sampling(temperature=jnp.ones(()))
    return Problem(rows=p, prompts=p, length=t, vocab=9, params={}, example=example, sampling=sampling)


def pipo_step(outcome, *, negative=0.1, count=8, start=8, fill=0.0):
    """Parameters and memory after a step whose batch has mean reward `outcome`, after one of other data."""
    algorithm = load("pipo", group_size=4, negative=negative, start=start)
    _, before = random_batch(jax.random.key(3), fill=fill)
    _, batch = random_batch(jax.random.key(4))
    batch = dataclasses.replace(batch, reward=jnp.full(batch.outcome.shape, outcome))
    before, now = prepare(algorithm, before), prepare(algorithm, batch)
    now = dataclasses.replace(now, reward=jnp.full(batch.outcome.shape, outcome))
    memory = pipo.remembered(algorithm.update.init(problem(batch)), before)
    memory = {**memory, "window": WINDOW, "count": jnp.array(count)}
    params = jnp.where(before.mask, before.rollouts.logp, 0.0) + 0.05 * jax.random.normal(KEY, before.mask.shape)
    learn = fake_learn(algorithm.loss)
    (models, metrics), memory = algorithm.update.apply(memory, KEY, ({"policy": params}, {}), now, learn)
    return algorithm, params, before, now, learn, models[0]["policy"], metrics, memory


@pytest.mark.parametrize(("mean", "sign"), [(0.45, 1.0), (0.15, 0.1)])
def test_pipo_reinforces_or_undoes_the_step_before(mean, sign):
    algorithm, params, before, now, learn, got, metrics, _ = pipo_step(mean)
    xi = (mean - 0.275) / 0.0433012702
    advantage = np.asarray(before.advantage)[..., 0]  # 0 for rows that do not count
    size = 3 * np.ones((3, 1)) + np.array([[0], [0], [1]])  # rows that count: 3, 3 and 4
    credit = np.clip(size * advantage / np.abs(advantage).sum(-1, keepdims=True) * xi, -10, 10)
    credit = jnp.where(before.mask, credit[..., None], 0.0)
    value = evaluate(algorithm.loss, Scores(logp=params), dataclasses.replace(before, advantage=credit))
    params = params - 0.5 * sign * value.coefficient / before.mask.sum()
    want = learn(({"policy": params}, {}), now)[0][0]["policy"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["improvement"], xi, rtol=1e-4)
    assert metrics["looked_back"] == 1 and (value.coefficient != 0).any()


@pytest.mark.parametrize(("mean", "options"), [(0.275, {}), (0.15, {"negative": 0.0}), (0.45, {"count": 7})])
def test_pipo_without_news_is_the_usual_update(mean, options):
    _, params, _, now, learn, got, metrics, _ = pipo_step(mean, **options)
    want = several_passes(jax.random.split(KEY)[1], ({"policy": params}, {}), now, learn)[0][0]["policy"]
    np.testing.assert_array_equal(got, want)
    assert metrics["looked_back"] == 0 and (got != params).any()


def test_pipo_remembers_this_batch_and_this_mean():
    _, _, _, now, _, clean, _, memory = pipo_step(0.45)
    np.testing.assert_allclose(memory["window"], [*WINDOW[1:], 0.45], rtol=1e-6)
    assert memory["count"] == 9
    np.testing.assert_array_equal(memory["advantage"], now.advantage)
    np.testing.assert_array_equal(memory["keep"], now.rows)
    np.testing.assert_array_equal(memory["rollouts"].logp, now.rollouts.logp)
    np.testing.assert_array_equal(clean, pipo_step(0.45, fill=jnp.nan)[5])
    nothing = dataclasses.replace(now, keep=jnp.zeros_like(now.keep))
    kept = pipo.remembered(memory, nothing)
    np.testing.assert_array_equal(kept["window"], memory["window"])
    assert kept["count"] == 9 and not kept["keep"].any()


def test_pipo_is_grpo_with_a_token_mean():
    scores, batch = random_batch(jax.random.key(11))
    for kl in (None, 0.04):
        same_loss(load("pipo", kl=kl), changed("grpo", kl=kl, loss={"aggregate": token_mean}), scores, batch)
