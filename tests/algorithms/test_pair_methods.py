"""Losses on pairs and groups of whole answers: DisCO, CoPG, P3O and trajectory balance."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithms import copg, disco, for_tb, load, p3o
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.group import mean_over_pairs
from jaxrl_llm.rollouts.replay import with_replay
from jaxrl_llm.rollouts.tempered import sample_tempered
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch
from jaxrl_llm.types import INJECTED, POLICY, Problem, Sampling, Scores, World

ROWS = jnp.ones(3, bool)


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / jnp.maximum(batch.mask.sum(), 1)


def full():
    """Groups without missing rows."""
    _, batch = random_batch(jax.random.key(11))
    rollouts = dataclasses.replace(batch.rollouts, mask=jnp.ones_like(batch.rollouts.mask))
    return dataclasses.replace(batch, rollouts=rollouts, keep=jnp.ones_like(batch.keep))


@pytest.mark.parametrize("name", ["copg", "p3o"])
def test_a_pair_needs_two(name):
    with pytest.raises(ValueError, match="group_size must be at least 2, got 1"):
        load(name, group_size=1)


# --- DisCO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tau", "value", "weights"),
    [(10.0, 0.246875, [0.512497, 0.487503]), (0.5, 0.189943, [0.731059, 0.268941]), (1e4, 0.249997, [0.5, 0.5])],
)
def test_disco_weighs_the_likeliest_mistakes(tau, value, weights):
    def objective(score):
        reward, rows = jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.ones(4, bool)
        return -disco.discriminate(score, reward, rows, of_wrong=lambda s, r: disco.soft_maximum(s, r, tau=tau))

    found, slope = jax.value_and_grad(objective)(jnp.array([-0.3, -0.5, -0.4, -0.9]))
    np.testing.assert_allclose(found, value, atol=2e-6)
    np.testing.assert_allclose(slope, [0.5, 0.5, -weights[0], -weights[1]], atol=2e-5)


@pytest.mark.parametrize("shift", [-2e-4, -5e-5])
def test_disco_constrains_beyond_the_bound_alone(shift):
    batch = toy_batch(logp=jnp.zeros((1, 2, 2)), outcome=[[1.0, 1.0]], keep=[[True, True]])
    value, slope = run(load("disco"), Scores(logp=jnp.full((1, 2, 2), shift)), batch)
    np.testing.assert_allclose(value, 5e-6 if shift < -1e-4 else 0.0, rtol=1e-3)
    np.testing.assert_allclose(slope, -0.1 / 4 if shift < -1e-4 else 0.0, rtol=1e-3)


def test_disco_without_tau_and_bound_is_reinforce():
    """In groups with answers of both kinds; the third has right ones only, adds nothing and is counted."""
    batch = full()
    outcome = jnp.array([[1.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    batch = dataclasses.replace(batch, outcome=outcome)
    credit = jnp.array([[4, -4 / 3, -4 / 3, -4 / 3], [2, 2, -2, -2], [0, 0, 0, 0]])
    parent = load("reinforce")
    parent = dataclasses.replace(
        parent,
        advantage=lambda batch: credit,
        loss=dataclasses.replace(parent.loss, aggregate=sequence_mean_token_mean),
    )
    scores = Scores(logp=batch.rollouts.logp - 0.3)
    child = load("disco", tau=None, bound=jnp.inf)
    want = run(parent, scores, batch)
    np.testing.assert_allclose(run(child, scores, batch)[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(run(child, scores, batch)[1], want[1], rtol=1e-4, atol=1e-7)
    assert not np.allclose(run(load("disco", tau=0.1), scores, batch)[1], want[1], rtol=1e-2)
    # At the old policy the average ratio is 1, and its gradient that of the average log-prob.
    at = Scores(logp=batch.rollouts.logp)
    value, slope = run(load("disco", score=disco.average_ratio, tau=1.0), at, batch)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(slope, want[1], rtol=1e-4, atol=1e-7)


# --- CoPG -----------------------------------------------------------------------------------------------------------


def test_copg_is_least_where_differences_agree():
    value, slope = jax.value_and_grad(lambda d: copg.contrast(d, 0.0, 1.0, 0.0, kl=0.5))(0.4)
    np.testing.assert_allclose([value + 1, slope], [0.64, -0.8], rtol=1e-5)  # 1 / (2 kl) = 1 is the constant
    np.testing.assert_allclose(jax.grad(lambda d: copg.contrast(d, 0.0, 1.0, 0.0, kl=0.5))(2.0), 0, atol=1e-6)


def test_copg_at_the_reference_is_leave_one_out():
    slope = jax.grad(lambda s: copg.contrasts(s, jnp.array([1, 0.5, 0]), ROWS, kl=0.5))(jnp.zeros(3))
    np.testing.assert_allclose(slope, [-0.75, 0, 0.75], atol=1e-6)


@pytest.mark.parametrize("at_reference", [True, False])
def test_copg_on_policy_is_rloo(at_reference):
    batch = full()
    if at_reference:
        batch = dataclasses.replace(batch, reference=Scores(logp=batch.rollouts.logp))
    at = Scores(logp=batch.rollouts.logp)
    got, want = (run(load(name, kl=0.5), at, batch)[1] for name in ("copg", "rloo"))
    np.testing.assert_allclose(got, 4 * want, rtol=1e-4, atol=1e-6)
    assert np.allclose(run(load("rloo", kl=None), at, batch)[1], want, rtol=1e-4, atol=1e-6) is at_reference


def test_copg_is_least_at_the_tilted_reference_whatever_wrote_the_answers():
    """`log pi = log pi_ref + R / kl + const`: no pair has a gradient."""
    reward = jnp.array([1.0, 0.5, 0.0])
    slope = jax.grad(lambda s: copg.contrasts(s, reward, ROWS, kl=0.5))
    np.testing.assert_allclose(slope(reward / 0.5 - 3.0), 0, atol=1e-6)
    assert abs(slope(reward)).max() > 0.1


def test_pairs_do_not_see_what_a_prompt_adds_to_every_reward():
    scores, batch = random_batch(jax.random.key(2))
    moved = dataclasses.replace(batch, outcome=batch.outcome + jnp.array([[1.0], [-2.0], [5.0]]))
    for name in ("copg", "p3o"):
        np.testing.assert_allclose(run(load(name), scores, moved)[1], run(load(name), scores, batch)[1], atol=1e-5)


# --- P3O ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pair", "want"), [(p3o.separate_clip, [0, 0.610701]), (p3o.joint_clip, [0, 0])])
def test_p3o_clips(pair, want):
    def loss(first, second):
        return pair(first, second, 1.0, 0.0, clip=0.2)

    np.testing.assert_allclose(jax.grad(loss, (0, 1))(0.3, -0.1), want, atol=1e-6)
    swapped = pair(-0.1, 0.3, 0.0, 1.0, clip=0.2)
    np.testing.assert_allclose(swapped, loss(0.3, -0.1), rtol=1e-6)


@pytest.mark.parametrize("pair", [p3o.separate_clip, p3o.joint_clip])
def test_p3o_is_finite_far_from_the_old_policy(pair):
    batch = full()
    got = run(load("p3o", pair=pair), Scores(logp=batch.rollouts.logp + 100.0), batch)
    assert all(jnp.isfinite(x).all() for x in got)


@pytest.mark.parametrize("pair", [p3o.separate_clip, p3o.joint_clip])
def test_p3o_at_the_old_policy_is_rloo(pair):
    batch = jax.tree.map(lambda x: x[:, :2] if jnp.ndim(x) > 1 and x.shape[1] == 4 else x, full())
    at = Scores(logp=batch.rollouts.logp)
    got, want = (run(a, at, batch)[1] for a in (load("p3o", pair=pair), load("rloo", kl=0.05)))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert (got != 0).any()


def test_no_pair_is_no_loss():
    zero = mean_over_pairs(lambda a, b, r, s: a - b + 1, jnp.ones(3), jnp.ones(3), jnp.array([True, False, False]))
    assert zero == 0


# --- trajectory balance ---------------------------------------------------------------------------------------------


def test_var_grad_by_hand():
    z = jnp.array([-3.693147, -4.0, -1.806853])
    value, slope = jax.value_and_grad(lambda z: for_tb.var_grad(z, jnp.zeros(3), ROWS))(z)
    np.testing.assert_allclose(value, 0.940240, atol=1e-6)
    np.testing.assert_allclose(slope, [-0.350987, -0.555556, 0.906543], atol=1e-6)
    in_proportion = for_tb.var_grad(jnp.array([-1.0, 0.5, 2.0]) - 7, jnp.array([-1.0, 0.5, 2.0]), ROWS)
    np.testing.assert_allclose(in_proportion, 0, atol=1e-10)


def test_trajectory_balance_is_reinforce_with_entropy_in_the_reward():
    batch = full()

    def credit(batch):
        return per_group(center, dataclasses.replace(batch, reward=2 * (batch.reward - batch.rollouts.logp.sum(-1))))

    at = Scores(logp=batch.rollouts.logp)
    child = load("for_tb")
    want = run(dataclasses.replace(load("reinforce"), reward=child.reward, advantage=credit), at, batch)[1]
    np.testing.assert_allclose(run(child, at, batch)[1], want, rtol=1e-4, atol=1e-6)
    assert (want != 0).any()


@pytest.mark.parametrize(("step", "exponent"), [(0, 1.0), (500, 1.5), (2000, 2.0)])
def test_rewards_have_a_logarithm_and_an_annealed_exponent(step, exponent):
    batch = toy_batch(logp=jnp.zeros((1, 3, 1)), outcome=[[1.0, 0.0, -5.0]])
    batch = dataclasses.replace(batch, step=jnp.asarray(step))
    got = for_tb.log_reward(batch, beta=1.0, final_beta=2.0, horizon=1000.0, floor=1e-3)
    np.testing.assert_allclose(got, exponent * np.log([[1.001, 1e-3, 1e-3]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("step", "hot"), [(0, 2.0), (25, 1.75), (200, 1.0)])
def test_some_rows_are_drawn_hot_and_learnt_under_the_runs_distribution(step, hot):
    _, batch = random_batch(jax.random.key(0), prompts=8, size=32)
    asked = []

    def sample(key, prompts, size, *, sampling, limit):
        asked.append(sampling.temperature)
        return dataclasses.replace(batch.rollouts, sampling=sampling)

    own = Sampling(temperature=jnp.asarray(0.9))
    world = World(sample=sample, score=None, reward=None, models={}, step=jnp.asarray(step), length=5, sampling=own)
    got = sample_tempered(world, jax.random.key(1), batch.prompts, size=32, temperature=2.0, chance=0.5, horizon=100.0)
    drawn = np.asarray(asked[0])
    assert set(np.unique(drawn)) == {np.float32(0.9), np.float32(hot)}
    assert 0.35 < (drawn == np.float32(hot)).mean() < 0.65
    np.testing.assert_allclose(got.sampling.temperature, 0.9)


def test_the_best_log_z_is_minus_the_mean_and_descent_finds_it():
    logp = jnp.array([[[-3.0], [-4.0], [-2.5]]])
    batch = toy_batch(logp=logp, old=logp, reward=jnp.log(jnp.array([[2.0, 1.0, 0.5]])), keep=[[True] * 3])
    loss = for_tb.learned_z(start=5.0, rate=0.1)
    memory = loss.init(None)
    np.testing.assert_allclose(loss.observe(memory, batch)["log_z"], 5 - 0.1 * 2 * (5 - 3.166667), rtol=1e-5)
    for _ in range(60):
        memory = loss.observe(memory, batch)
    np.testing.assert_allclose(memory["log_z"], 3.166667, rtol=1e-4)
    shared = dataclasses.replace(batch, share=loss.aggregate(batch.mask))
    (value, _), _ = loss.apply(memory, None, Scores(logp=logp), shared)
    np.testing.assert_allclose(value, 0.940240, rtol=1e-4)  # that of VarGrad


def test_replay_remembers_new_rows_in_a_circle_and_samples_nothing_in_their_place():
    batch = toy_batch(logp=jnp.zeros((2, 2, 3)), tokens=jnp.arange(12).reshape(2, 2, 3), keep=jnp.ones((2, 2)))
    twice = dataclasses.replace(batch.prompts, index=jnp.array([1, 1]))
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, prompts=twice))
    asked = []

    def sample(world, key, prompts, *, size, limit):
        asked.append(limit)
        return dataclasses.replace(batch.rollouts, prompts=prompts, tokens=jnp.full((2, 2, 3), 77))

    stage = with_replay(sample, size=2, keep=3, chance=1.0)
    memory = stage.observe(stage.init(Problem(rows=4, prompts=2, length=3, vocab=9, params={})), batch)
    np.testing.assert_array_equal(memory["tokens"][1, :, 0], [0, 3, 6])
    one = dataclasses.replace(batch, keep=jnp.array([[False, True], [False, False]]))
    memory = stage.observe(memory, one)
    np.testing.assert_array_equal(memory["tokens"][1, :, 0], [3, 3, 6])
    np.testing.assert_array_equal(memory["written"], [0, 4, 0, 0])

    world = World(sample=None, score=None, reward=None, models={}, step=jnp.asarray(0), length=3)
    prompts = dataclasses.replace(twice, index=jnp.array([1, 2]))
    rollouts, _ = stage.apply(memory, jax.random.key(0), world, prompts)
    np.testing.assert_array_equal(asked[0], [[0, 0], [3, 3]])
    assert set(np.asarray(rollouts.tokens[0, :, 0])) <= {3, 6}
    assert (rollouts.tokens[1] == 77).all()
    np.testing.assert_array_equal(rollouts.role[..., 0], [[INJECTED, INJECTED], [POLICY, POLICY]])
    with pytest.raises(ValueError, match="keep must be 0 or at least the group size 4, got 2"):
        load("for_tb", replay=2)
