"""Methods that change the optimiser step: PIPO, N-PG-IGT, HARPG, Bayesian policy gradient, AEPO, Deep GA and BuPO."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import world as outside
from jaxrl_llm.algorithms import bayes_pg, deep_ga, harpg, load, pipo
from jaxrl_llm.engine import learner
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.models.heads import hidden_states
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts, whole_step
from jaxrl_llm.types import Learn, Problem, Sampling, Scores, World
from jaxrl_llm.updates import momentum
from jaxrl_llm.updates.passes import several_passes

KEY = jax.random.key(0)


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


# --- N-PG-IGT and HARPG ---------------------------------------------------------------------------------------------

HALF, TENTH, ONE = (partial(momentum.constant, value=x) for x in (0.5, 0.1, 1.0))
SCHEDULES = {"eta": HALF, "gamma": TENTH}


def quadratic():
    """What an update is given if the loss is `theta^2 / 2`, and where models were asked to sample."""
    asked = []
    _, batch = random_batch(KEY, size=3)
    rollouts = dataclasses.replace(batch.rollouts, outcome=batch.outcome)

    def world(models):
        asked.append(models[0]["policy"])

    learn = fake_learn(None, world=world)

    def gradient(models, batch, loss=None):
        return ((jnp.zeros(()), {}), {"policy": models[0]["policy"]})

    return dataclasses.replace(learn, gradient=gradient), dataclasses.replace(batch, rollouts=rollouts), asked


def steps_of(update, learn, batch, start, count):
    """Parameters of the policy and memory after each step."""
    memory, models, found = update.init(Problem(rows=1, prompts=1, length=1, vocab=1, params=start)), (start, {}), []
    for t in range(count):
        now = dataclasses.replace(batch, step=jnp.asarray(t))
        (models, _), memory = update.apply(memory, jax.random.fold_in(KEY, t), models, now, learn)
        found.append((models[0]["policy"], memory))
    return found


def test_npg_igt_average_is_the_gradient_on_a_quadratic():
    learn, batch, _ = quadratic()
    found = steps_of(load("npg_igt", **SCHEDULES).update, learn, batch, {"policy": jnp.array(1.0)}, 4)
    np.testing.assert_allclose([memory["params"] for _, memory in found], [0.9, 0.8, 0.7, 0.6], rtol=1e-5)
    np.testing.assert_allclose([ahead for ahead, _ in found], [0.8, 0.7, 0.6, 0.5], rtol=1e-5)
    np.testing.assert_allclose([memory["slope"] for _, memory in found], [1.0, 0.9, 0.8, 0.7], rtol=1e-5)


def test_harpg_average_is_the_gradient_on_a_quadratic(monkeypatch):
    monkeypatch.setattr(harpg, "hessian_product", lambda learn, models, batch, change: change)
    learn, batch, asked = quadratic()
    update = load("harpg", **SCHEDULES, direction=momentum.unscaled).update
    again = dataclasses.replace(load("reinforce"), rollout=lambda world, key, prompts: batch.rollouts)
    update = dataclasses.replace(update, apply=partial(update.apply, algorithm=again))
    found = steps_of(update, learn, batch, {"policy": jnp.array(1.0)}, 3)
    np.testing.assert_allclose([p for p, _ in found], [0.9, 0.81, 0.729], rtol=1e-5)
    np.testing.assert_allclose([memory["slope"] for _, memory in found], [1.0, 0.9, 0.81], rtol=1e-5)
    assert asked[0] == 1 and 0.9 < asked[1] < 1 and 0.81 < asked[2] < 0.9


def test_schedules_of_the_theory():
    t = jnp.arange(3)
    np.testing.assert_allclose(momentum.NEW_WEIGHT(t), [1, 0.722981, 0.574349], rtol=1e-5)
    np.testing.assert_allclose(momentum.STEP_SIZE(t) / momentum.STEP_SIZE(0), [1, 2 / 3, 1 / 2], rtol=1e-5)


def test_npg_igt_steps_have_the_given_length_or_none():
    learn, batch, _ = quadratic()
    start = {"policy": {"a": jnp.array([3.0, -1.0]), "b": jnp.array([[2.0]])}}
    for params, length in ((start, 0.1), (jax.tree.map(jnp.zeros_like, start), 0.0)):
        before = params["policy"]
        for _, memory in steps_of(load("npg_igt", **SCHEDULES).update, learn, batch, params, 3):
            moves = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), memory["params"], before)
            np.testing.assert_allclose(jnp.sqrt(sum(jax.tree.leaves(moves))), length, rtol=1e-4)
            before = memory["params"]


@pytest.mark.parametrize("name", ["npg_igt", "harpg"])
def test_with_the_weight_one_they_are_normalised_reinforce(name):
    algorithm, parent = load(name, group_size=4, eta=ONE, gamma=TENTH), load("reinforce", group_size=4)
    scores, batch = random_batch(jax.random.key(11))
    same_loss(algorithm, parent, scores, batch)
    batch = prepare(parent, batch)
    rollouts = dataclasses.replace(batch.rollouts, outcome=batch.outcome)
    again = dataclasses.replace(parent, rollout=lambda world, key, prompts: rollouts)
    update = algorithm.update
    if name == "harpg":
        update = dataclasses.replace(update, apply=partial(update.apply, algorithm=again))
    params = jnp.where(batch.mask, scores.logp, 0.0)
    learn = fake_learn(parent.loss, world=lambda models: None)
    for got, _ in steps_of(update, learn, batch, {"policy": params}, 2):
        slope = learn.gradient(({"policy": params}, {}), batch)[1]["policy"]
        params = params - 0.1 * slope / jnp.sqrt(jnp.sum(slope**2))
        np.testing.assert_allclose(got, params, rtol=1e-5, atol=1e-6)


def all_answers(fill=0.0):
    """Rows of two tokens that are as frequent as they are probable, and the parameters of that policy `[T V]`."""
    first, second = jnp.meshgrid(jnp.array([0, 0, 1, 2]), jnp.array([0, 1]), indexing="ij")
    tokens = jnp.stack([first.ravel(), second.ravel(), jnp.zeros(8, jnp.int32)], -1)[None]
    reward = jnp.array([[0.3, 1.0], [-0.5, 2.0], [0.7, 0.1]])
    mask = jnp.broadcast_to(jnp.array([True, True, False]), tokens.shape)
    advantage = jnp.where(mask, reward[tokens[..., 0], tokens[..., 1]][..., None], fill)
    batch = toy_batch(logp=jnp.where(mask, 0.0, fill), mask=mask, advantage=advantage, tokens=tokens)
    params = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.5, 0.5, 1e-9], [0.2, 0.3, 0.5]]))
    return params, batch, reward


@pytest.mark.parametrize("fill", [0.0, jnp.nan])
def test_harpg_hessian_is_that_of_the_expected_reward(fill):
    params, batch, reward = all_answers(fill)
    change = jax.random.normal(KEY, params.shape)

    def loss(params):
        p = jax.nn.softmax(params)
        return -jnp.einsum("a,b,ab->", p[0], p[1, :2], reward)

    got = harpg.hessian_product(fake_learn(load("harpg").loss, softmax), ({"policy": params}, {}), batch, change)
    want = jnp.einsum("ijkl,kl->ij", jax.hessian(loss)(params), change)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    # A baseline changes nothing: the rows' scores add up to 0, and so do their second derivatives.
    lower = dataclasses.replace(batch, advantage=batch.advantage - 1.0)
    got = harpg.hessian_product(fake_learn(load("harpg").loss, softmax), ({"policy": params}, {}), lower, change)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


# --- Bayesian policy gradient ---------------------------------------------------------------------------------------

U, Y = jnp.array([[1, -1, 1, -1], [0.5, 0.5, -0.5, -0.5]]), jnp.array([1.0, 0.0, 1.0, 0.0])
KEPT = jnp.ones(4, bool)


def posterior(model, *, noise=0.1, ridge=1e-6, scores=U, returns=Y, keep=KEPT):
    gram = scores.T @ scores
    kernel, natural = bayes_pg.fisher(gram, keep.sum(), ridge)
    weights, variance = model(returns, kernel, gram, keep, noise=noise)
    return scores @ weights, variance, scores @ (natural @ weights)


def test_bayes_pg_by_hand():
    mean, variance, natural = posterior(bayes_pg.scalar_returns)
    np.testing.assert_allclose(mean, [0.487805, 0], atol=2e-5)
    np.testing.assert_allclose(variance, 0.024390 + 0.006098, atol=2e-5)
    np.testing.assert_allclose(natural, [0.487805, 0], atol=2e-5)  # the Fisher matrix is diag(1, 1/4)
    mean, variance, _ = posterior(bayes_pg.vector_returns)
    np.testing.assert_allclose(mean, [0.495868, 0], atol=5e-5)
    np.testing.assert_allclose(variance, 0.024793, atol=5e-5)


@pytest.mark.parametrize("model", [bayes_pg.scalar_returns, bayes_pg.vector_returns])
def test_bayes_pg_is_the_textbook_matrix_formula(model):
    scores, returns = jax.random.normal(KEY, (3, 6)), jax.random.normal(jax.random.key(1), (6,))
    u, y, eye = np.float64(scores), np.float64(returns), np.eye(6)
    fisher = u @ u.T / 6 + 0.01 * np.eye(3)
    kernel = u.T @ np.linalg.inv(fisher) @ u
    if model is bayes_pg.scalar_returns:
        mean = u @ np.linalg.inv(kernel + 0.3 * eye) @ y
        variance = np.trace(u @ u.T / 6 - u @ np.linalg.inv(kernel + 0.3 * eye) @ u.T)
    else:
        b, inverse = 1 + np.diag(kernel), np.linalg.inv((1 + kernel) ** 2 + 0.3 * eye)
        mean, variance = u @ (y * (inverse @ b)), 1 + np.diag(kernel).mean() - b @ inverse @ b
    got = posterior(model, noise=0.3, ridge=0.01, scores=scores, returns=returns, keep=jnp.ones(6, bool))
    np.testing.assert_allclose(got[0], mean, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got[1], variance, rtol=1e-3)
    np.testing.assert_allclose(got[2], np.linalg.inv(fisher) @ mean, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("model", [bayes_pg.scalar_returns, bayes_pg.vector_returns])
def test_bayes_pg_does_not_see_rows_that_do_not_count(model):
    more = jnp.concatenate([U, jnp.zeros((2, 2))], -1)
    keep = jnp.arange(6) < 4
    got = posterior(model, scores=more, returns=jnp.append(Y, jnp.zeros(2)), keep=keep)
    for a, b in zip(got, posterior(model), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_bayes_pg_is_surer_of_more_rows():
    few, many = (
        posterior(bayes_pg.scalar_returns, scores=jnp.tile(U, n), returns=jnp.tile(Y, n), keep=jnp.ones(4 * n, bool))[1]
        for n in (1, 4)
    )
    assert 0 < many < few / 3


def bayes_step(fill=0.0, rate=1.0, **options):
    """How far a step moves a softmax policy on ragged rows, some of which do not count."""
    algorithm = load("bayes_pg", group_size=4, **options)
    _, batch = random_batch(jax.random.key(11), fill=fill)
    tokens = jax.random.randint(KEY, batch.mask.shape, 0, 6)
    batch = prepare(algorithm, dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, tokens=tokens)))
    params = jax.random.normal(jax.random.key(2), (5, 6))
    learn = fake_learn(algorithm.loss, softmax, rate=rate)
    (models, _), metrics = algorithm.update(KEY, ({"policy": params}, {}), batch, learn)
    return models["policy"] - params, metrics, (params, batch, learn)


@pytest.mark.parametrize("natural", [False, True])
def test_bayes_pg_steps_along_the_posterior_mean(natural):
    move, metrics, (params, batch, _) = bayes_step(natural=natural)

    def logp(params):
        return jnp.sum(jnp.where(batch.mask, softmax(params, batch).logp, 0), -1)[batch.rows]

    scores = jax.jacobian(logp)(params).reshape(-1, 30).T
    returns = batch.advantage[..., 0][batch.rows]
    got = posterior(
        bayes_pg.scalar_returns, scores=scores, returns=returns, keep=jnp.ones(returns.shape, bool), ridge=1e-3
    )
    np.testing.assert_allclose(move.ravel(), got[2 if natural else 0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(metrics["gradient_variance"], got[1], rtol=1e-3)


def test_bayes_pg_with_much_noise_is_reinforce():
    scores, batch = random_batch(jax.random.key(11))
    same_loss(load("bayes_pg"), load("reinforce"), scores, batch)
    move, _, (params, batch, learn) = bayes_step(noise=1e5, rate=1e5)
    want = -learn.gradient(({"policy": params}, {}), batch)[1]["policy"]
    np.testing.assert_allclose(move, batch.rows.sum() * want, rtol=2e-3, atol=1e-5)


def test_bayes_pg_padding_changes_no_bit():
    np.testing.assert_array_equal(bayes_step()[0], bayes_step(fill=jnp.nan)[0])


# --- AEPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "temperature"), [(0.0, 1.2), (0.75, 1.2), (0.7501, 0.8)])
def test_aepo_samples_a_quarter_again_at_the_temperature_that_is_needed(entropy, temperature):
    def sample(key, prompts, size, *, sampling):
        shape = (prompts.index.shape[0], size, 2)
        drawn = toy_batch(logp=jnp.zeros(shape)).rollouts
        return dataclasses.replace(drawn, prompts=prompts, sampling=sampling)

    own = Sampling(temperature=jnp.array(1.0), top_k=jnp.array(7))
    kept = []

    def spy(key, prompts, size, *, sampling):
        kept.append(sampling)
        return sample(key, prompts, size, sampling=sampling)

    world = World(sample=spy, score=None, reward=None, models={}, step=jnp.array(0), length=2, sampling=own)
    got, memory = load("aepo_arbitrary", group_size=3).rollout.apply(jnp.array(entropy), KEY, world, toy_prompts(8))
    np.testing.assert_array_equal(got.prompts.index, [0, 1, 2, 3, 4, 5, 6, 7, 0, 1])
    np.testing.assert_allclose(kept[0].temperature, np.array([[1.0]] * 8 + [[temperature]] * 2) * np.ones(3))
    assert (kept[0].top_k == 7).all() and (got.sampling.temperature == 1).all() and memory == entropy
    np.testing.assert_array_equal(got.segment[:, 0, 0], [0] * 8 + [1] * 2)


def aepo_batch(entropy=0.0, fill=0.0, **options):
    """Four groups of four, the last two of them extra; row 3 of each group does not count. What is in the loss."""
    algorithm = load("aepo_arbitrary", group_size=4, **options)
    keep = jnp.ones((4, 4), bool).at[:, 3].set(False)
    outcome = jnp.array([[1.0, 0, 0, fill], [0, 1, 1, fill], [1, 1, 0, fill], [1, 1, 1, fill]])
    batch = toy_batch(logp=jnp.zeros((4, 4, 2)), outcome=outcome, keep=keep, old=jnp.full((4, 4, 2), -0.3))
    segment = jnp.broadcast_to(jnp.array([0, 0, 1, 1])[:, None, None], (4, 4, 2))
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, segment=segment))
    batch = dataclasses.replace(batch, advantage=algorithm.advantage(batch))
    select, _ = algorithm.weight.apply(jnp.array(entropy), KEY, batch)
    return batch, select & keep


def test_aepo_extra_rows_are_good_or_nothing():
    batch, _ = aepo_batch()
    z = 2 / 3 / np.sqrt(1 / 3)
    np.testing.assert_allclose(batch.advantage[0, :, 0], [z, -z / 2, -z / 2, 0], rtol=1e-4)
    np.testing.assert_array_equal(batch.advantage[2:, :, 0], [[1, 1, 0, 0], [0, 0, 0, 0]])
    assert not aepo_batch(threshold=0.9)[0].advantage[2:].any()


@pytest.mark.parametrize(
    ("entropy", "most", "n"), [(0.0, 60, 2), (0.0, 1, 1), (0.75, 60, 2), (0.76, 60, 1), (0.9, 1, 0)]
)
def test_aepo_good_rows_take_the_place_of_others(entropy, most, n):
    batch, select = aepo_batch(entropy, most=most)
    assert select[:2].sum() == 6 - n and select[2:].sum() == n
    assert (batch.advantage[2:][select[2:]] == 1).all()
    np.testing.assert_array_equal(select, aepo_batch(entropy, fill=jnp.nan, most=most)[1])


def test_aepo_estimates_what_it_learns_from():
    batch, select = aepo_batch()
    old = dataclasses.replace(batch.old, logp=jnp.where(select[..., None], -0.25, jnp.nan))
    batch = dataclasses.replace(batch, old=old, select=jnp.broadcast_to(select[..., None], (4, 4, 2)))
    for slot in ("rollout", "weight"):
        observe = getattr(load("aepo_arbitrary"), slot).observe
        np.testing.assert_allclose(observe(jnp.array(9.0), batch), 0.25, rtol=1e-6)
        nothing = dataclasses.replace(batch, select=jnp.zeros((4, 4, 2), bool))
        assert observe(jnp.array(9.0), nothing) == 9


def test_aepo_ratios_are_of_the_learnt_distribution():
    algorithm = load("aepo_arbitrary", group_size=4)
    batch, select = aepo_batch()
    batch = dataclasses.replace(batch, select=jnp.broadcast_to(select[..., None], (4, 4, 2)))
    got = evaluate(algorithm.loss, Scores(logp=batch.old.logp), batch)  # the sampler's are 0
    np.testing.assert_array_equal(got.metrics["ratio"], 1.0)
    np.testing.assert_allclose(got.coefficient, -jnp.where(select[..., None], batch.advantage, 0), rtol=1e-6)


def test_aepo_without_extra_rows_is_grpo_with_a_dual_clip():
    scores, batch = random_batch(jax.random.key(11))
    ratio = load("aepo_arbitrary").loss.ratio
    loss = {"ratio": ratio, "aggregate": token_mean, "surrogate": partial(dual_clip, low=0.2, high=0.2, bound=3.0)}
    same_loss(load("aepo_arbitrary"), changed("grpo", kl=None, loss=loss), scores, batch)


# --- Deep GA --------------------------------------------------------------------------------------------------------


def world_of_targets(models):
    """Rewards are minus the squared distance of the parameters to (1, -2), the same for every response."""
    params = models[0]["policy"]

    def sample(key, prompts, size):
        return dataclasses.replace(toy_batch(logp=jnp.zeros((3, size, 2))).rollouts, prompts=prompts)

    def reward(rollouts):
        found = -jnp.sum(jnp.square(params["a"] - jnp.array([1.0, -2.0]))) - params["b"] ** 2
        found = jnp.broadcast_to(found, rollouts.mask.shape[:2])
        return found.at[0, 0].set(jnp.nan)  # could not be scored

    return World(sample=sample, score=None, reward=reward, models=models[0], step=jnp.array(0), length=2)


def evolved(steps, *, start=None, **options):
    algorithm = load(
        "deep_ga", **({"population": 16, "parents": 4, "candidates": 4, "sigma": 0.3, "size": 2} | options)
    )
    batch = toy_batch(logp=jnp.zeros((3, 2, 2)))
    learn = fake_learn(None, world=world_of_targets)
    start = {"policy": {"a": jnp.zeros(2), "b": jnp.ones(())}} if start is None else start
    return steps_of(algorithm.update, learn, batch, start, steps)


def test_deep_ga_parents_are_the_fittest_and_the_elite_comes_first():
    start = {"a": jnp.zeros(2), "b": jnp.ones(())}
    (elite, parents), *_ = evolved(1)
    keys = jax.random.split(jax.random.fold_in(KEY, 0), 3)
    born = deep_ga.children(jax.tree.map(lambda x: jnp.stack([x] * 4), start), keys[0], count=16, sigma=0.3)
    first = -np.sum((np.asarray(born["a"]) - [1, -2]) ** 2, -1) - np.asarray(born["b"]) ** 2
    order = np.argsort(-first)
    assert first[order[0]] > -6  # of the policy at the start
    np.testing.assert_array_equal(elite["a"], born["a"][order[0]])
    np.testing.assert_array_equal(parents["a"], born["a"][order[:4]])
    np.testing.assert_array_equal(parents["b"], born["b"][order[:4]])


def test_deep_ga_learns_and_its_elite_never_gets_worse():
    found = [jnp.sum(jnp.square(p["a"] - jnp.array([1, -2]))) + p["b"] ** 2 for p, _ in evolved(12)]
    assert (np.diff(found) <= 0).all() and found[-1] < 1 < found[0]


@pytest.mark.parametrize(
    ("elite", "want"), [(-1, [7, 5, 3]), (0, [5, 3, 9]), (2, [7, 5, 9]), (3, [7, 5, 3]), (4, [7, 5, 3])]
)
def test_deep_ga_elite_takes_the_last_place_unless_it_has_one(elite, want):
    np.testing.assert_array_equal(deep_ga.fittest(jnp.array([7, 5, 3, 9, 1]), jnp.array(elite), 4), want)


def test_deep_ga_children_are_mutations_of_uniform_parents():
    parents = {"a": jnp.array([0.0, 100.0, 200.0]), "b": jnp.zeros((3, 2))}
    born = deep_ga.children(parents, KEY, count=600, sigma=0.5)
    _, counts = np.unique(jnp.round(born["a"] / 100), return_counts=True)
    assert counts.size == 3 and counts.min() > 150
    noise = jnp.concatenate([(born["a"] - 100 * jnp.round(born["a"] / 100))[:, None], born["b"]], -1)
    np.testing.assert_allclose(noise.std(0), 0.5, rtol=0.1)
    assert (np.abs(np.corrcoef(noise.T) - np.eye(3)) < 0.15).all()
    for x, y in zip(
        *(jax.tree.leaves(deep_ga.children(parents, KEY, count=600, sigma=0.5)) for _ in "12"), strict=True
    ):
        np.testing.assert_array_equal(x, y)


def test_deep_ga_without_mutation_changes_nothing():
    for policy, parents in evolved(2, sigma=0.0):
        assert not policy["a"].any() and policy["b"] == 1 and not parents["a"].any()


@pytest.mark.parametrize("options", [{"parents": 0}, {"parents": 65}, {"candidates": 1}, {"candidates": 66}])
def test_deep_ga_sizes_must_fit(options):
    with pytest.raises(ValueError, match=r"parents must be in \[1, 64\] and candidates in \[2, 65\]"):
        load("deep_ga", **options)


# --- BuPO -----------------------------------------------------------------------------------------------------------

DUAL = {"aggregate": token_mean, "surrogate": partial(dual_clip, low=0.2, high=0.2, bound=10.0)}


def with_inner(scores, batch):
    """Scores that know the log-probs of an inner policy too."""
    other = jax.random.normal(jax.random.key(9), batch.mask.shape)
    fill = jnp.where(batch.mask, scores.logp + 0.3 * other, scores.logp)
    return dataclasses.replace(scores, extras={"inner_logp": fill}), batch


@pytest.mark.parametrize("fill", [0.0, jnp.nan])
def test_bupo_is_grpo_of_the_inner_policy_and_then_of_the_whole(fill):
    scores, batch = with_inner(*random_batch(jax.random.key(11), fill=fill))
    parent, child = changed("grpo", kl=None, loss=DUAL), load("bupo", steps=3)
    assert not load("bupo", steps=0).loss.keywords["steps"]
    for step, logp in ((0, scores.extras["inner_logp"]), (2, scores.extras["inner_logp"]), (3, scores.logp)):
        now = whole_step(child.loss, scores, dataclasses.replace(prepare(parent, batch), step=jnp.array(step)))

        def loss(logp, inner, now=now):
            return child.loss(Scores(logp=logp, extras={"inner_logp": inner}), now)[0]

        value, slopes = jax.value_and_grad(loss, (0, 1))(scores.logp, scores.extras["inner_logp"])
        want = evaluate(parent.loss, Scores(logp=logp), now)
        np.testing.assert_allclose(value, want.value, rtol=1e-6)
        np.testing.assert_allclose(slopes[step < 3], want.coefficient / now.mask.sum(), rtol=1e-5, atol=1e-8)
        assert not slopes[step >= 3].any() and want.coefficient.any()


@pytest.mark.parametrize("step", [0, 1])
def test_bupo_ratios_begin_at_one(step):
    """The inner policy's log-prob is half that of the whole."""
    algorithm = load("bupo", group_size=4, steps=1)

    def score(params, batch):
        return Scores(logp=params[batch.prompts.index], extras={"inner_logp": 0.5 * params[batch.prompts.index]})

    _, batch = random_batch(jax.random.key(11))
    batch = dataclasses.replace(prepare(algorithm, batch), step=jnp.array(step))
    params = batch.rollouts.logp
    fake = fake_learn(algorithm.loss, score)
    got = algorithm.update(KEY, ({"policy": params}, {}), batch, fake)[0][0]["policy"]
    reinforce = -jnp.where(batch.mask, batch.advantage, 0) / batch.mask.sum()
    np.testing.assert_allclose(got, params - 0.5 * reinforce * (0.5 if step == 0 else 1), rtol=1e-5, atol=1e-6)


def layers(number):
    return transformer(
        TransformerConfig(
            vocab_size=100,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=number,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=False,
        )
    )


def test_inner_layers_of_a_transformer():
    model, rollouts = layers(2), toy_batch(logp=jnp.zeros((2, 2, 3))).rollouts
    params = model.init(KEY)
    last = hidden_states(model, params, rollouts, layer=1)
    rms = jnp.sqrt(jnp.mean(last**2, -1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(last / rms, hidden_states(model, params, rollouts), rtol=1e-5)
    first = {**params, "layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    want = hidden_states(layers(1), first, rollouts, layer=0)
    np.testing.assert_allclose(hidden_states(model, params, rollouts, layer=0), want, rtol=1e-5)
    assert not np.allclose(want, last)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 1\] in this model, got 2"):
        hidden_states(model, params, rollouts, layer=2)
    with pytest.raises(ValueError, match="this model shows no layers"):
        hidden_states(dataclasses.replace(model, inner=None), params, rollouts, layer=0)


def test_bupo_leaves_upper_layers_alone_at_first(letters):
    model = layers(2)
    algorithm = load("bupo", group_size=8, layer=0, steps=1)
    parts = learner(algorithm, policy=language_model(model), task=letters, prompts_per_step=2, optimizer=optax.sgd(1.0))
    state, step = parts.init(jax.random.key(1)), jax.jit(parts.step)
    for moves in (False, True):
        old, (state, metrics) = state.params["policy"], step(state)
        changed = jax.tree.map(lambda a, b: np.asarray(a != b), old, state.params["policy"])
        assert 0 < metrics["reward/mean"] < 1
        assert all(x[0].any() for x in jax.tree.leaves(changed["layers"]))
        assert all(x[1].any() == moves for x in jax.tree.leaves(changed["layers"]))
        assert changed["norm"]["scale"].any() == moves and changed["lm_head"].any() and changed["embed"].any()


def test_bupo_needs_one_inner_layer():
    recipe = load("bupo", layer=3)
    with pytest.raises(TypeError, match="must bind one int"):
        dataclasses.replace(recipe, measures={**recipe.measures, "other": load("bupo", layer=4).measures["inner_logp"]})
    with pytest.raises(ValueError, match="layer and steps must not be negative, got -1 and 30"):
        load("bupo", layer=-1)
