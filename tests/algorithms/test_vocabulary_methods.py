"""Methods that look at more than the sampled token: CAPO, ROVER, DGPO, DCPO and GTPO."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.group import center, center_scale, per_group
from jaxrl_llm.algorithms import dcpo_distribution, dgpo, gtpo, load, rover
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.stages import lift, write
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch
from jaxrl_llm.types import Problem, Sampling, Scores
from jaxrl_llm.weights import curvature

V, D, INF = 6, 3, float("inf")


def data(fill=0.0):
    """`random_batch` with the measures of all these methods."""
    scores, batch = random_batch(jax.random.key(11), fill=fill)
    keys, shape = jax.random.split(jax.random.key(4), 6), batch.mask.shape

    def put(x):
        return jnp.where(batch.mask.reshape(*shape, *[1] * (x.ndim - 3)), x, fill)

    logits, ids = jax.lax.top_k(jax.random.normal(keys[1], (*shape, V)), 4)
    before = {
        "hidden_state": put(jax.random.normal(keys[2], (*shape, D))),
        "top_logits": put(logits),
        "top_ids": ids,
        "average_logp": put(-jnp.abs(jax.random.normal(keys[3], shape))),
        "hot": batch.old.logp - put(jnp.full(shape, 0.1)),
        "cold": batch.old.logp + put(jnp.full(shape, 0.1)),
    }
    now = {
        "average_logp": put(-jnp.abs(jax.random.normal(keys[5], shape))),
        "deviation": put(jax.random.uniform(keys[4], shape)),
    }
    rollouts = dataclasses.replace(batch.rollouts, tokens=jax.random.randint(keys[0], shape, 0, V))
    old = dataclasses.replace(batch.old, extras=before)
    return dataclasses.replace(scores, extras=now), dataclasses.replace(batch, rollouts=rollouts, old=old)


def run(algorithm, scores, batch):
    """Value, gradient and the memories after the step."""
    problem = Problem(rows=3, prompts=3, length=5, vocab=V, params={}, width=D)
    batch = dataclasses.replace(batch, reward=None, token_reward=None, advantage=None, weight=None, select=None)
    stages, memory = {}, {}
    for slot in ("reward", "filter", "advantage", "weight"):
        stages[slot] = lift(slot, getattr(algorithm, slot))
        output, memory[slot] = stages[slot].apply(stages[slot].init(problem), jax.random.key(0), batch)
        batch = write(slot, batch, output)
    got = evaluate(algorithm.loss, scores, batch)
    gradient = got.coefficient / jnp.maximum(batch.mask.sum(), 1)
    return got.value, gradient, {slot: stages[slot].observe(memory[slot], batch) for slot in stages}


def change(name, *, aggregate=None, **slots):
    parent = load(name, **({"kl": None} if name == "grpo" else {}))
    loss = dataclasses.replace(parent.loss, **({"aggregate": aggregate} if aggregate else {}))
    return dataclasses.replace(parent, loss=loss, **slots)


def equal(a, b):
    return np.allclose(a[0], b[0], rtol=1e-5, atol=1e-7) and np.allclose(a[1], b[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["capo", "dcpo_distribution"])
def test_what_is_masked_reaches_no_memory(name):
    clean, dirty = run(load(name), *data()), run(load(name), *data(jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)
    assert any((x != 0).any() for x in jax.tree.leaves(clean[2]))


# --- CAPO -----------------------------------------------------------------------------------------------------------


def fresh(vocab=3, width=2):
    return {name: jnp.zeros((vocab, width)) for name in ("first", "second")} | {"count": jnp.array(0)}


def test_capo_predicts_by_hand():
    pi = jnp.array([0.5, 0.3, 0.2])
    token = curvature.Token(jnp.array([1.0, 2.0]), pi, jnp.arange(3), jnp.array([1.0, 0.0, 0.0]) - pi, jnp.array(1.0))
    change = partial(curvature.predicted, fresh(), rate=0.01, b1=0.9, b2=0.999, eps=1e-8)
    np.testing.assert_allclose(change(token), [0.0189985, 0.0001805], rtol=1e-5)
    np.testing.assert_allclose(change(token._replace(advantage=jnp.array(0.0))), 0.0)
    # The slope and the bend of A pi / pi_old along the step, and that of an advantage below 0.
    for advantage, bend in ((1.0, -0.03), (-1.0, 0.03)):
        objective, policy = change(token._replace(advantage=jnp.array(advantage)))
        np.testing.assert_allclose(objective, 0.019 + 0.5e-4 * bend, rtol=1e-5)
        np.testing.assert_allclose(policy, 0.5e-4 * 1.9**2, rtol=1e-5)


def test_capo_bends_as_the_ratio_does():
    """Against jax's own derivatives of `A pi_W(token) / pi(token)` along the step, with a memory: Adam's direction."""
    keys = jax.random.split(jax.random.key(2), 6)
    hidden, w = jax.random.normal(keys[0], (4,)), jax.random.normal(keys[1], (5, 4))
    ids, a = jnp.array([3, 0, 4]), jnp.array(-1.7)
    memory = {
        "first": 0.1 * jax.random.normal(keys[2], (5, 4)),
        "second": 0.1 * jnp.abs(jax.random.normal(keys[3], (5, 4))),
        "count": jnp.array(2),
    }
    pi = jax.nn.softmax(w[ids] @ hidden)
    token = curvature.Token(hidden, pi, ids, jnp.array([0.0, 1.0, 0.0]) - pi, a)
    b1, b2, eps, rate = 0.9, 0.99, 1e-8, 0.1
    gradient = a * jax.grad(lambda w: jax.nn.log_softmax(w[ids] @ hidden)[1])(w)[ids]
    first = (b1 * memory["first"][ids] + (1 - b1) * gradient) / (1 - b1**3)
    second = (b2 * memory["second"][ids] + (1 - b2) * gradient**2) / (1 - b2**3)
    step = first / (jnp.sqrt(second) + eps)

    def gain(x):
        return a * jax.nn.softmax((w[ids] + x * step) @ hidden)[1] / pi[1]

    objective, policy = curvature.predicted(memory, token, rate=rate, b1=b1, b2=b2, eps=eps)
    slope, bend = jax.grad(gain)(0.0), jax.grad(jax.grad(gain))(0.0)
    np.testing.assert_allclose(objective, rate * slope + rate**2 / 2 * bend, rtol=1e-4)
    np.testing.assert_allclose(policy, rate**2 / 2 * (slope / a) ** 2, rtol=1e-4)
    forgot = curvature.predicted(memory | {"count": jnp.array(0)}, token, rate=rate, b1=b1, b2=b2, eps=eps)
    assert not np.allclose(forgot[0], objective, rtol=0.1)


@pytest.mark.parametrize(
    ("bounds", "accepted"),
    [
        ({"objective_bound": 0.03, "policy_bound": 1e-3}, [True, False, True]),
        ({"objective_bound": 0.03, "policy_bound": 1e-4}, [False, False, True]),
        ({"objective_bound": 0.01, "policy_bound": 1e-3}, [False, False, True]),
        ({"objective_bound": 0.03, "policy_bound": 1e-3, "symmetric": False}, [True, False, True]),
    ],
)
def test_capo_accepts_within_both_bounds(bounds, accepted):
    """The token of the hand-worked example; one four times as good; one that is not among the highest logits."""
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2]] * 3))
    extras = {"hidden_state": jnp.array([[1.0, 2.0]] * 3), "top_logits": logits, "top_ids": jnp.array([[0, 1, 2]] * 3)}
    tokens, advantage = jnp.array([[[0, 0, 5]]]), jnp.array([[[1.0, 4.0, 0.1]]])
    batch = toy_batch(logp=jnp.zeros((1, 1, 3)), tokens=tokens, advantage=advantage)
    batch = dataclasses.replace(batch, old=Scores(extras={k: x[None, None] for k, x in extras.items()}))
    got, _ = curvature.within_curvature(rate=0.01, **bounds).apply(fresh(), None, batch)
    np.testing.assert_array_equal(got, [[accepted]])


def seen_token(token, advantage, **extras):
    """One token of a batch and what the measures of CAPO say of it."""
    batch = toy_batch(
        logp=jnp.zeros((1, 1, 1)), tokens=jnp.array([[[token]]]), advantage=jnp.full((1, 1, 1), advantage)
    )
    extras = {name: jnp.array(x)[None, None, None] for name, x in extras.items()}
    return dataclasses.replace(batch, old=Scores(extras=extras))


@pytest.mark.parametrize("symmetric", [True, False])
def test_capo_may_ask_that_the_objective_grows(symmetric):
    """Momentum against the gradient makes it fall."""
    batch = seen_token(0, 1.0, hidden_state=[1.0, 2.0], top_logits=np.log([0.5, 0.3, 0.2]), top_ids=[0, 1, 2])
    against = -jnp.array([[0.5], [-0.3], [-0.2]]) * jnp.array([1.0, 2.0])
    memory = {"first": against, "second": jnp.ones((3, 2)), "count": jnp.array(1)}
    stage = curvature.within_curvature(rate=0.01, policy_bound=INF, symmetric=symmetric)
    assert bool(stage.apply(memory, None, batch)[0]) is symmetric
    assert stage.apply(fresh(), None, batch)[0] == (0.0189985 < 0.01)
    assert curvature.within_curvature(rate=0.005, policy_bound=INF, symmetric=symmetric).apply(fresh(), None, batch)[0]


def test_capo_at_another_temperature_looks_at_tempered_logits():
    batch = seen_token(1, 1.0, hidden_state=[1.0, 2.0], top_logits=[2.0, 0.0], top_ids=[1, 0])
    rollouts = dataclasses.replace(batch.rollouts, sampling=Sampling(temperature=jnp.full((1, 1), 2.0)))
    token = curvature._tokens(dataclasses.replace(batch, rollouts=rollouts))
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(token.pi[0, 0, 0], [p, 1 - p], rtol=1e-6)
    np.testing.assert_allclose(token.residual[0, 0, 0], [1 - p, p - 1], rtol=1e-6)
    np.testing.assert_allclose(token.hidden[0, 0, 0], [0.5, 1.0])


def test_capo_without_bounds_is_grpo():
    scores, batch = data()
    grpo = change("grpo", advantage=partial(per_group, partial(center_scale, eps=1e-4)))
    assert equal(run(load("capo", objective_bound=INF, policy_bound=INF), scores, batch), run(grpo, scores, batch))
    assert not equal(run(load("capo", learning_rate=0.3), scores, batch), run(grpo, scores, batch))


def test_capo_with_every_token_rejected_is_0_and_remembers_nothing():
    value, gradient, memory = run(load("capo", policy_bound=0.0), *data())
    assert value == 0 and not gradient.any()
    assert not any(x.any() for x in jax.tree.leaves(memory["weight"]))


def test_capo_moments_are_adams_of_touched_rows():
    """Two accepted positions and a rejected one, worked in numpy."""
    hidden = np.array([[1.0, 2.0], [-1.0, 0.5], [9.0, 9.0]], np.float32)
    ids, tokens = np.array([[0, 1], [1, 2], [0, 3]]), np.array([0, 3, 0])
    advantage = np.array([1.0, -2.0, 5.0], np.float32)
    extras = {"hidden_state": hidden, "top_logits": np.zeros((3, 2), np.float32), "top_ids": ids}
    batch = toy_batch(logp=jnp.zeros((1, 1, 3)), tokens=tokens[None, None], advantage=advantage[None, None])
    old = Scores(extras={name: jnp.asarray(x)[None, None] for name, x in extras.items()})
    batch = dataclasses.replace(batch, old=old, select=jnp.array([[[True, True, False]]]))
    got = curvature.within_curvature(b1=0.9, b2=0.99).observe(fresh(4), batch)
    total, count = np.zeros((4, 2)), np.zeros(4)
    for i in (0, 1):
        for j in ids[i]:
            total[j] += advantage[i] * ((j == tokens[i]) - 0.5) * hidden[i]
            count[j] += 1
    mean = total / np.maximum(count, 1)[:, None]
    np.testing.assert_allclose(got["first"], 0.1 * mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["second"], 0.01 * mean**2, rtol=1e-4, atol=1e-7)
    assert got["count"] == 1 and not got["first"][3].any()


def test_rejected_rows_stay_in_the_mean_over_rows():
    batch = toy_batch(logp=jnp.zeros((1, 4, 2)), keep=[[True, True, True, False]])
    some = dataclasses.replace(batch, select=jnp.array([[[1, 0], [0, 0], [1, 1], [1, 1]]], bool))
    np.testing.assert_allclose(curvature.of_all_rows(some), 2 / 3, rtol=1e-6)


# --- ROVER ----------------------------------------------------------------------------------------------------------


def test_rover_by_hand():
    old = jnp.full((1, 1, 2), jnp.log(0.25))
    p = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.2], [0.7, 0.1, 0.1, 0.1]]))
    batch = toy_batch(logp=old, advantage=[[0.75]])
    batch = dataclasses.replace(batch, old=Scores(logp=old, extras={"average_logp": old}))
    scores = Scores(logp=jnp.log(jnp.array([[[0.4, 0.7]]])), extras={"average_logp": p.mean(-1)[None, None]})
    got = evaluate(load("rover").loss, scores, batch)
    np.testing.assert_allclose(got.metrics["target"], [[[0.320187, 0.75]]], atol=1e-6)
    np.testing.assert_allclose(got.value, 0.050316, atol=1e-6)
    np.testing.assert_allclose(got.metrics["value"], [[[0.470004, 1.029619]]], atol=1e-6)
    # Without looking ahead the first target is the advantage alone.
    alone = evaluate(load("rover", following=rover.nothing).loss, scores, batch)
    np.testing.assert_allclose(alone.value, ((0.470004 - 0.75) ** 2 + (1.029619 - 0.75) ** 2) / 2, atol=1e-6)
    # Twice the scale: q and V double, the reward does not.
    twice = evaluate(load("rover", scale=2.0).loss, scores, batch)
    np.testing.assert_allclose(twice.metrics["target"], [[[0.75 - 2 * 0.429813, 0.75]]], atol=2e-6)


def test_rover_looks_ahead_to_the_next_token_the_policy_chose():
    """Over what a tool wrote, and to nothing after the last; the value is a difference of divergences from uniform."""
    now, old = jax.random.normal(jax.random.key(0), (2, 4, 5))
    extras = [{"average_logp": rover.average_logp(z, None, None)[None, None]} for z in (now, old)]
    batch = toy_batch(logp=jnp.zeros((1, 1, 4)), mask=[[[1, 0, 1, 1]]], advantage=[[0.0]])
    batch = dataclasses.replace(batch, old=Scores(logp=jnp.zeros((1, 1, 4)), extras=extras[1]))
    got = rover.of_uniform_policy(Scores(extras=extras[0]), batch)[0, 0]

    def from_uniform(z):
        return -jnp.log(5) - jax.nn.log_softmax(z).mean(-1)

    want = from_uniform(old) - from_uniform(now)
    np.testing.assert_allclose(got[jnp.array([0, 2, 3])], [want[2], want[3], 0], atol=1e-6)
    tempered = rover.average_logp(now, None, None, temperature=0.6)
    np.testing.assert_allclose(tempered, jax.nn.log_softmax(now / 0.6).mean(-1), rtol=1e-5)


def test_rover_at_the_old_policy_is_twice_reinforce():
    _, batch = data()
    at = Scores(logp=batch.old.logp, extras={"average_logp": batch.old.extras["average_logp"]})
    want = run(change("reinforce", advantage=partial(per_group, center), aggregate=token_mean), at, batch)[1]
    value, gradient, _ = run(load("rover"), at, batch)
    np.testing.assert_allclose(gradient, 2 * want, rtol=1e-4, atol=1e-7)
    centred = prepare(load("rover"), batch)
    np.testing.assert_allclose(value, jnp.square(centred.advantage).sum() / centred.mask.sum(), rtol=1e-5)


# --- DGPO -----------------------------------------------------------------------------------------------------------


def test_dgpo_by_hand():
    p, q = jnp.log(jnp.array([0.7, 0.2, 0.1])), jnp.log(jnp.array([0.4, 0.4, 0.2]))
    np.testing.assert_allclose(dgpo.deviation(p, None, None, reference=q), 0.034, atol=1e-6)
    np.testing.assert_allclose(dgpo.deviation(p, None, None, reference=q, power=0.0), 0.046586, atol=1e-6)
    np.testing.assert_allclose(dgpo.deviation(p, None, None, reference=p), 0, atol=1e-6)
    share = dgpo.redistribute(jnp.array([0.1, 0.3, 0.0, 0.2, 7.0]), jnp.arange(5) < 4, tau=0.5)
    np.testing.assert_allclose(share, [0.882621, 1.316715, 0.722629, 1.078035, 0], atol=1e-5)


def test_dgpo_without_deviation_or_at_infinite_tau_is_grpo():
    scores, batch = data()
    grpo = run(change("grpo"), scores, batch)
    flat = dataclasses.replace(scores, extras={"deviation": jnp.zeros(batch.mask.shape)})
    assert equal(run(load("dgpo"), flat, batch), grpo) and equal(run(load("dgpo", tau=INF), scores, batch), grpo)
    assert not equal(run(load("dgpo"), scores, batch), grpo)


# --- DCPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("entropy", "correct", "wrong"), [(0.42, 1.445592, -0.409137), (0.5, 1.620182, -0.540060)])
def test_dcpo_by_hand(entropy, correct, wrong):
    old = jnp.full((1, 8, 1), -0.42)
    batch = toy_batch(logp=old, outcome=[[1, 1, 0, 0, 0, 0, 0, 0]], keep=jnp.ones((1, 8)))
    extras = {"hot": old + jnp.log(0.9), "cold": old + 3.0}
    batch = dataclasses.replace(batch, old=Scores(logp=old, extras=extras))
    stage = load("dcpo_distribution", entropy=0.5).advantage
    advantage, _ = stage.apply({"entropy": jnp.array(entropy)}, None, batch)
    np.testing.assert_allclose(advantage[0, (0, 7), 0], [correct, wrong], atol=2e-6)
    np.testing.assert_allclose(stage.observe({"entropy": jnp.array(0.0)}, batch)["entropy"], 0.42, rtol=1e-6)


def test_dcpo_at_its_entropy_is_grpo():
    scores, batch = data()
    on = load("dcpo_distribution", entropy=0.0)  # what the first step takes the entropy to be
    plain = dataclasses.replace(on, advantage=change("grpo").advantage)
    assert equal(run(on, scores, batch), run(plain, scores, batch))
    assert not equal(run(load("dcpo_distribution"), scores, batch), run(plain, scores, batch))
    # Nothing right, nothing to imitate.
    wrong = dataclasses.replace(batch, outcome=jnp.where(batch.keep, -batch.outcome, batch.outcome))
    assert equal(run(load("dcpo_distribution"), scores, wrong), run(plain, scores, wrong))


def test_dcpo_tempers_the_token_that_was_drawn():
    z, tokens = jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([4, 0, 2])
    got = dcpo_distribution.tempered_logp(z, tokens, None, temperature=1.2)
    np.testing.assert_allclose(got, jax.nn.log_softmax(z / 1.2)[jnp.arange(3), tokens], rtol=1e-5)
    at_one = dcpo_distribution.tempered_logp(z, tokens, None, temperature=1.0)
    np.testing.assert_allclose(at_one, jax.nn.log_softmax(z)[jnp.arange(3), tokens], rtol=1e-5)


@pytest.mark.parametrize(("remembered", "used"), [(0.24, "hot"), (0.25, "hot"), (0.26, "cold")])
def test_dcpo_is_hot_up_to_its_entropy(remembered, used):
    """Two rows, one of them right: `a = min(gap, 0.1) / (1/2 + min(gap, 0.1))`."""
    old = jnp.full((1, 2, 1), -1.0)
    batch = toy_batch(logp=old, outcome=[[1, 0]], keep=jnp.ones((1, 2)))
    rho = {"hot": 0.5, "cold": 3.0}
    extras = {name: old + jnp.log(x) for name, x in rho.items()}
    batch = dataclasses.replace(batch, old=Scores(logp=old, extras=extras))
    advantage, _ = load("dcpo_distribution").advantage.apply({"entropy": jnp.array(remembered)}, None, batch)
    gap = abs(0.25 - remembered)
    a = gap / (0.5 + gap)
    group = 0.5 / np.sqrt(0.5)
    np.testing.assert_allclose(advantage[0, :, 0], [(1 - a) * group + a * rho[used], -(1 - a) * group], rtol=1e-4)


# --- GTPO -----------------------------------------------------------------------------------------------------------


def test_gtpo_by_hand():
    tokens = jnp.array([[5, 7, 9, 2, 3, 0], [5, 7, 8, 4, 2, 3]])
    mask = jnp.arange(6) < jnp.array([[5], [6]])
    weights = gtpo.conflict_weights(tokens, mask, jnp.array([0.5, -0.5]))
    np.testing.assert_array_equal(weights[0, :5], [2, 2, 1, 2, 2])
    np.testing.assert_array_equal(weights[1], [0, 0, 1, 1, 0, 0])
    assert (gtpo.conflict_weights(tokens, mask, jnp.zeros(2)) == 1).all()
    # A third row of the other sign begins like the first and ends like it: both runs are the whole row.
    same = jnp.array([[1, 2, 0], [1, 2, 0], [1, 3, 2]])
    twice = gtpo.conflict_weights(same, jnp.arange(3) < jnp.array([[2], [2], [3]]), jnp.array([0.5, -0.5, -0.5]))
    np.testing.assert_array_equal(twice[0, :2], [4, 4])
    shaped = gtpo.shaped(jnp.array([0.5, -0.5, 0.5]), jnp.array([0.3, 0.3, 0.8]), weight=0.1, limit=0.7)
    np.testing.assert_allclose(shaped, [0.47, -0.53, 0], atol=1e-6)


def test_gtpo_runs_stop_at_the_first_token_nobody_of_the_other_sign_shares():
    """The other row need not be the same along the run; rows without credit take no part."""
    tokens = jnp.array([[1, 2, 3, 9, 5], [1, 7, 3, 8, 6], [4, 2, 3, 8, 6], [1, 2, 3, 9, 5]])
    sign = jnp.array([1.0, -1.0, -1.0, 0.0])
    run = gtpo.shared_run(tokens, jnp.ones((4, 5), bool), sign)
    np.testing.assert_array_equal(run[0], [True, True, True, False, False])
    np.testing.assert_array_equal(run[1], [True, False, False, False, False])
    assert not run[2].any() and not run[3].any()


def test_gtpo_pushes_equal_rewards_down_by_their_entropy():
    batch = toy_batch(logp=jnp.zeros((1, 2, 2)), mask=[[[1, 1], [1, 0]]], outcome=[[1.0, 1.0]], keep=jnp.ones((1, 2)))
    entropy = jnp.array([[[0.2, 0.4], [1.5, jnp.nan]]])
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, entropy=entropy))
    np.testing.assert_allclose(prepare(load("gtpo"), batch).advantage, [[[-0.03, -0.03], [0, 0]]], atol=1e-7)
    assert not prepare(load("gtpo", entropy=0.0), batch).advantage.any()


def test_gtpo_without_shared_tokens_or_entropy_is_reinforce():
    scores, batch = data()
    different = jnp.arange(batch.mask.size).reshape(batch.mask.shape)
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, tokens=different))
    got = run(load("gtpo", entropy=0.0, limit=INF), scores, batch)[1]
    parent = change("reinforce", advantage=partial(per_group, center), aggregate=sequence_mean_token_mean)
    np.testing.assert_allclose(got, run(parent, scores, batch)[1], rtol=1e-4, atol=1e-7)
