"""Methods that do not wait for a response to end, and the critics that judge what has not ended."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.gae import gae, returns
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.april import first_complete
from jaxrl_llm.algorithms.t_ppo import egae
from jaxrl_llm.algorithms.vapo import adaptive_gae, adaptive_lam, vapo, weighted_nll
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.together import Together, correct_tokens, valued
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.resume import unfinished
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_rows, toy_world
from jaxrl_llm.types import Problem, Sampling, Scores
from jaxrl_llm.updates.critic import critic_first

B, T, SAMPLING = 6, 8, Sampling(temperature=jnp.ones(()))


@pytest.fixture(scope="module")
def params(policy):
    return policy.init(jax.random.key(0))


@pytest.fixture(scope="module")
def world(policy, letters, params):
    """About every fifth token ends a response; its reward is its length."""
    task = dataclasses.replace(letters, stop=tuple((i,) for i in range(10, 22)))

    def lengths(rollouts):
        return rollouts.mask.sum(-1).astype(jnp.float32)

    return lambda step: toy_world(policy, task, params, length=T, step=step, sampling=SAMPLING, reward=lengths)


def drawn(letters, step):
    """Prompts of a step; `index` counts on from step to step."""
    prompts = letters.draw(jax.random.fold_in(jax.random.key(9), step), B)
    return dataclasses.replace(prompts, index=step * B + jnp.arange(B, dtype=jnp.int32))


def steps(stage, world, letters, n):
    """What the rollout stage returns and remembers, step by step."""
    example = jax.eval_shape(lambda: drawn(letters, 0))
    problem = Problem(rows=99, prompts=B, length=T, vocab=64, params={}, example=example, sampling=SAMPLING)
    apply = jax.jit(lambda memory, i: stage.apply(memory, jax.random.key(i), world(i), drawn(letters, i)))
    memory, found = stage.init(problem), []
    for i in range(n):
        rollouts, memory = apply(memory, jnp.int32(i))
        found.append((rollouts, memory))
    return found


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / jnp.maximum(batch.mask.sum(), 1)


def same(child, parent, scores, batch):
    (value, gradient), (want, want_gradient) = run(child, scores, batch), run(parent, scores, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    assert (gradient != 0).any()


# --- april ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def april_steps(world, letters):
    return steps(load("april", group_size=3).rollout, world, letters, 5)


def test_april_trains_on_complete_groups_and_only_on_as_many_as_wanted(april_steps):
    for rollouts, memory in april_steps:
        assert rollouts.tokens.shape == (B // 2, 3, T) and not unfinished(rollouts).any()
        assert memory["held"].all() and memory["groups"].tokens.shape == (B // 2, 3, T)
    assert unfinished(april_steps[0][1]["groups"]).any()


def test_april_loses_no_token(april_steps):
    generated = trained = 0
    for rollouts, memory in april_steps:
        generated += int(rollouts.generated.sum())
        trained += int(rollouts.mask.sum())
        assert generated == trained + int(memory["groups"].mask.sum())


def test_april_is_first_in_first_out(april_steps):
    """Indices count up with age. What waits is asked first; of what is complete the oldest is trained on."""
    waiting: list[int] = []
    for step, (rollouts, memory) in enumerate(april_steps):
        asked = waiting + list(range(step * B, step * B + B - len(waiting)))
        trained, waiting = rollouts.prompts.index.tolist(), memory["groups"].prompts.index.tolist()
        assert sorted(trained + waiting) == asked and trained == sorted(trained) and waiting == sorted(waiting)
        complete = ~np.asarray(unfinished(memory["groups"]).any(-1))
        assert all(index > max(trained) for index in np.asarray(waiting)[complete])


def test_april_rows_hold_tokens_of_several_policies_with_the_log_probs_of_each(april_steps, world):
    mixed = 0
    for rollouts, _ in april_steps:
        version, mask = np.asarray(rollouts.version), np.asarray(rollouts.mask)
        assert (np.diff(np.where(mask, version, 99), axis=-1) >= 0).all()
        mixed += (np.where(mask, version, 99).min(-1) < np.where(mask, version, -1).max(-1)).sum()
        scores = world(0).score("policy", rollouts)
        np.testing.assert_allclose(np.where(mask, scores.logp, 0), rollouts.logp, atol=1e-5)
    assert mixed > 0


def test_april_stops_in_the_instant_in_which_enough_groups_are_complete(april_steps):
    """All rows of the first step started together: none is longer than the longest of the trained ones."""
    rollouts, memory = april_steps[0]
    longest = np.asarray(rollouts.mask.sum(-1)).max()
    assert np.asarray(memory["groups"].mask.sum(-1)).max() <= longest < T


def test_april_without_oversampling_is_a_group_of_samples(world, letters):
    memory = load("april", group_size=3, oversample=1).rollout.init(
        Problem(
            rows=9,
            prompts=B,
            length=T,
            vocab=64,
            params={},
            example=jax.eval_shape(lambda: drawn(letters, 0)),
            sampling=SAMPLING,
        )
    )
    prompts, key = drawn(letters, 0), jax.random.key(3)
    got, _ = jax.jit(lambda m, k: first_complete(m, k, world(0), prompts, size=3, oversample=1))(memory, key)
    want = jax.jit(lambda k: sample_group(world(0), k, prompts, size=3))(key)
    for name in ("tokens", "mask", "role", "truncated", "prompts", "context", "sampling"):
        jax.tree.map(np.testing.assert_array_equal, getattr(got, name), getattr(want, name))
    np.testing.assert_allclose(got.logp, want.logp, atol=1e-5)


def test_april_is_grpo():
    parent = load("grpo", kl=None)
    wide = dataclasses.replace(parent.loss, surrogate=partial(clip_min, low=0.2, high=0.28))
    scores, batch = random_batch(jax.random.key(1))
    same(load("april"), dataclasses.replace(parent, loss=wide), scores, batch)
    assert not np.allclose(run(load("april"), scores, batch)[1], run(parent, scores, batch)[1], atol=1e-6)


def test_april_refuses_what_does_not_divide(world, letters):
    with pytest.raises(ValueError, match="oversample must be at least 1, got 0"):
        load("april", oversample=0)
    with pytest.raises(ValueError, match="6 prompts a step do not divide by oversample=4"):
        steps(load("april", oversample=4).rollout, world, letters, 1)


# --- t_ppo ------------------------------------------------------------------------------------------------------------


def cut(value, reward, *, length=3, budget=5, **fields):
    """Two rows of the same values: the first goes on, the second ended."""
    exists = jnp.broadcast_to(jnp.arange(budget) < length, (1, 2, budget))
    pad = jnp.full(budget - length, fields.pop("fill", 0.0))
    value = jnp.broadcast_to(jnp.concatenate([jnp.asarray(value), pad]), (1, 2, budget))
    return toy_batch(
        logp=jnp.zeros(value.shape),
        mask=exists,
        value=value,
        reward=jnp.array([[0.0, reward]]),
        truncated=jnp.array([[True, False]]),
        **fields,
    )


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_egae_of_rows_that_go_on_and_of_rows_that_ended(fill):
    batch = cut([0.4, 0.5, 0.6], 1.0, fill=fill)
    got = egae(batch, gamma=1.0, lam=0.95)[0, :, :3]
    np.testing.assert_allclose(got, [[0.195, 0.1, 0.0], [0.556, 0.48, 0.4]], atol=1e-6)
    got = egae(batch, gamma=0.99, lam=0.95)[0, 0]
    np.testing.assert_allclose(got, [0.178100, 0.088357, -0.006, 0, 0], atol=1e-6)


def test_egae_of_a_row_that_used_its_budget_bootstraps_nothing():
    batch = cut([0.4, 0.5, 0.6], 1.0, budget=3)
    np.testing.assert_allclose(egae(batch)[0], gae(batch)[0], atol=1e-6)
    assert not np.allclose(egae(batch)[0, 0], [0.195, 0.1, 0.0])


def test_egae_sees_only_the_tokens_of_this_step():
    """Tokens of earlier steps exist, and do not count."""
    batch = cut([9.0, 0.4, 0.5, 0.6], 1.0, length=4)
    now = jnp.arange(5) > 0
    batch = dataclasses.replace(
        batch, rollouts=dataclasses.replace(batch.rollouts, mask=batch.rollouts.mask & now), reward=None
    )
    got = egae(batch)[0]
    np.testing.assert_allclose(got[:, :4], [[0, 0.195, 0.1, 0.0], [0, 0.556, 0.48, 0.4]], atol=1e-6)


@pytest.fixture(scope="module")
def t_ppo_steps(world, letters):
    return steps(load("t_ppo", window=3).rollout, world, letters, 6)


def test_t_ppo_windows_partition_a_response(t_ppo_steps):
    """Per slot: the masks of successive steps are disjoint, in order, and add up to the response."""
    seen = np.zeros((B, T), bool)
    ended = np.ones(B, bool)
    for rollouts, memory in t_ppo_steps:
        seen[ended] = False
        now, exists = np.asarray(rollouts.mask)[:, 0], np.asarray(rollouts.attended)[:, 0]
        assert not (seen & now).any() and (now.sum(-1) <= 3).all() and now.any(-1).all()
        seen |= now
        np.testing.assert_array_equal(seen, exists)
        np.testing.assert_array_equal(memory.mask[:, 0], exists)
        ended = ~np.asarray(unfinished(memory))[:, 0]
    assert (np.asarray(t_ppo_steps[-1][0].attended).sum(-1) > 3).any()


def test_t_ppo_goes_on_with_unfinished_prompts_and_replaces_finished_ones(t_ppo_steps):
    index, going = np.zeros(B, int), np.zeros(B, bool)
    for step, (rollouts, memory) in enumerate(t_ppo_steps):
        want = np.where(going, index, step * B + np.arange(B))
        np.testing.assert_array_equal(rollouts.prompts.index, want)
        index, going = want, np.asarray(unfinished(memory))[:, 0]
    assert going.any() and not going.all()


def test_t_ppo_asks_the_verifier_for_whole_finished_responses_only(t_ppo_steps):
    """The reward is the length of what the verifier was shown."""
    for rollouts, _ in t_ppo_steps:
        going = np.asarray(unfinished(rollouts))
        lengths = np.asarray(rollouts.attended.sum(-1))
        np.testing.assert_array_equal(rollouts.outcome, np.where(going, 0, lengths))
        np.testing.assert_array_equal(rollouts.valued, np.asarray(rollouts.attended) & ~going[..., None])
        assert int(rollouts.generated.sum()) == int(rollouts.mask.sum())


def test_t_ppo_is_on_policy(t_ppo_steps, world):
    for step, (rollouts, _) in enumerate(t_ppo_steps):
        mask = np.asarray(rollouts.mask)
        assert (np.asarray(rollouts.version)[mask] == step).all()
        scores = world(0).score("policy", rollouts)
        np.testing.assert_allclose(np.asarray(scores.logp)[mask], np.asarray(rollouts.logp)[mask], atol=1e-5)


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_t_ppo_critic_learns_the_outcome_on_all_tokens_of_finished_rows_in_a_mean_of_its_own(fill):
    """Row 0 goes on (3 tokens, 1 of this step), row 1 ended (3 tokens, 2 of this step) with reward 1."""
    batch = cut([0.4, 0.5, 0.6], 1.0, fill=fill)
    now = jnp.array([[[0, 0, 1, 0, 0], [0, 1, 1, 0, 0]]], bool)
    learnt = batch.rollouts.attended & jnp.array([[[False], [True]]])
    rollouts = dataclasses.replace(batch.rollouts, mask=now, valued=learnt)
    batch = dataclasses.replace(batch, rollouts=rollouts, outcome=jnp.array([[0.0, 1.0]]))
    algorithm = load("t_ppo", value_weight=0.5, value_clip=jnp.inf)
    batch = prepare(algorithm, batch)

    def loss(value):
        scores = Scores(logp=jnp.zeros_like(value), value=value)
        return evaluate(algorithm.loss, scores, batch).value

    new = jnp.where(batch.rollouts.attended, 0.7, fill)
    got, slope = jax.value_and_grad(loss)(new)
    # The ratio is 1 and the advantages are whitened: the policy's part is 0.
    np.testing.assert_allclose(got, 0.5 / 2 * 0.3**2, rtol=1e-5)
    np.testing.assert_allclose(slope[0], [[0] * 5, [-0.05] * 3 + [0, 0]], rtol=1e-5, atol=1e-8)


def test_t_ppo_does_not_learn_values_from_dropped_rows():
    batch = cut([0.4, 0.5, 0.6], 1.0, keep=jnp.array([[True, False]]))
    learnt = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, valued=batch.rollouts.attended))
    np.testing.assert_array_equal(valued(learnt).sum(-1), [[3, 0]])


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_t_ppo_with_a_window_as_long_as_the_budget_is_ppo(weight):
    """Every row ended in the step in which it began; the critic of ppo with lam=1 learns the return too."""
    scores, batch = random_batch(jax.random.key(2))
    everything = dataclasses.replace(batch.rollouts, valued=batch.rollouts.mask)
    child = load("t_ppo", value_weight=weight)
    parent = load("ppo")
    target = partial(value_loss, returns=partial(returns, gamma=1.0, lam=1.0), weight=weight, clip=0.2)
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, terms=(target,)))
    same(child, parent, scores, dataclasses.replace(batch, rollouts=everything))

    def by_value(algorithm):
        ready = prepare(algorithm, dataclasses.replace(batch, rollouts=everything))
        return jax.grad(lambda v: evaluate(algorithm.loss, dataclasses.replace(scores, value=v), ready).value)(
            scores.value
        )

    np.testing.assert_allclose(by_value(child), by_value(parent), rtol=1e-4, atol=1e-6)


def test_t_ppo_needs_a_window():
    with pytest.raises(ValueError, match="window must be at least 1 token, got 0"):
        load("t_ppo", window=0)


# --- vc_ppo, vapo -----------------------------------------------------------------------------------------------------

HALF = {"logp": jnp.zeros((1, 1, 4)), "value": jnp.full((1, 1, 4), 0.5), "reward": jnp.array([[[0, 0, 0, 1.0]]])}


def test_decoupled_gae():
    batch = toy_batch(**HALF)
    np.testing.assert_allclose(gae(batch, lam=0.95)[0, 0], [0.428688, 0.45125, 0.475, 0.5], atol=1e-6)
    np.testing.assert_allclose(returns(batch, lam=1.0)[0, 0], [1, 1, 1, 1], atol=1e-6)
    np.testing.assert_allclose(returns(batch, lam=0.95)[0, 0], [0.928688, 0.95125, 0.975, 1], atol=1e-6)


def test_vc_ppo_critic_learns_the_return():
    batch = prepare(load("vc_ppo"), toy_batch(**HALF, outcome=jnp.ones((1, 1))))
    algorithm = load("vc_ppo", value_clip=jnp.inf)

    def loss(value):
        return evaluate(algorithm.loss, Scores(logp=jnp.zeros((1, 1, 4)), value=value), batch).value

    np.testing.assert_allclose(jax.grad(loss)(batch.value)[0, 0], [-0.125] * 4, rtol=1e-5)


def test_vc_ppo_is_ppo():
    scores, batch = random_batch(jax.random.key(3))
    same(load("vc_ppo", value_lam=0.95), load("ppo"), scores, batch)
    different = run(load("vc_ppo"), scores, batch)[0], run(load("ppo"), scores, batch)[0]
    assert not np.allclose(*different, rtol=1e-4)


def test_critic_first_lets_nothing_but_the_critic_move():
    def learn(models, batch):
        return jax.tree.map(lambda x: x + 1, models), {"loss": jnp.ones(())}

    params = {"policy": {"w": jnp.zeros(2)}, "critic": {"w": jnp.zeros(2)}, "reference": {"w": jnp.zeros(2)}}
    models = params, {"policy": jnp.zeros((), jnp.int32), "critic": jnp.zeros((), jnp.int32)}
    batch = toy_batch(logp=jnp.zeros((1, 1, 2)))
    for step, moved in ((0, 0), (1, 0), (2, 1), (3, 1)):
        now = dataclasses.replace(batch, step=jnp.asarray(step))
        (got, states), metrics = critic_first(jax.random.key(0), models, now, learn, steps=2)
        assert states["policy"] == moved and (got["policy"]["w"] == moved).all()
        assert states["critic"] == 1 and (got["critic"]["w"] == 1).all() and metrics == {"loss": 1}
        assert states["critic"].dtype == jnp.int32


def test_adaptive_lam():
    np.testing.assert_allclose(adaptive_lam(jnp.array([100, 1000, 10000])), [0.8, 0.98, 0.998], atol=1e-6)
    np.testing.assert_allclose(adaptive_lam(jnp.array([0, 3, 20, 21])), [0, 0, 0, 1 - 1 / 1.05], atol=1e-6)
    np.testing.assert_allclose(adaptive_lam(jnp.array([3, 100]), floor=0.9), [0.9, 0.9])
    # The sum of the powers of lambda is close to alpha * length.
    np.testing.assert_allclose(jnp.sum(adaptive_lam(jnp.array(1000)) ** jnp.arange(1000)), 50, rtol=1e-3)


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_adaptive_gae_gives_each_row_its_lambda(fill):
    """alpha=1: lam = 1 - 1/length, 0.75 for four tokens and 0.5 for two."""
    value = jnp.array([[[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, fill, fill]]])
    mask = jnp.array([[[1, 1, 1, 1], [1, 1, 0, 0]]])
    batch = toy_batch(logp=jnp.zeros((1, 2, 4)), mask=mask, value=value, reward=jnp.ones((1, 2)))
    got = adaptive_gae(batch, alpha=1.0)
    want = [[0.5 * 0.75**3, 0.5 * 0.75**2, 0.5 * 0.75, 0.5], [0.25, 0.5, 0, 0]]
    np.testing.assert_allclose(got[0], want, atol=1e-6)
    # A critic that is right leaves nothing to learn; one that says 0 leaves the return.
    right = dataclasses.replace(batch, value=jnp.ones((1, 2, 4)))
    np.testing.assert_allclose(adaptive_gae(right, alpha=1.0), jnp.zeros((1, 2, 4)), atol=1e-6)
    nothing = dataclasses.replace(batch, value=jnp.zeros((1, 2, 4)))
    np.testing.assert_allclose(adaptive_gae(nothing, alpha=jnp.inf), mask, atol=1e-6)


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_vapo_imitates_correct_rows_in_a_mean_over_their_tokens(fill):
    """Row 1 is correct: l = -1.0, -0.1. The other row's three tokens are not in the denominator."""
    scores, batch = toy_rows(outcome=jnp.array([[0.0, 1.0]]), fill=fill)

    def nothing(scores, batch):
        return jnp.zeros(()), {}

    loss = Together(loss=nothing, terms=(partial(weighted_nll, weight=0.1),), tokens=correct_tokens)
    got = evaluate(loss, scores, batch)
    np.testing.assert_allclose(got.value, 0.1 * (1.0 + 0.1) / 2, rtol=1e-6)
    np.testing.assert_allclose(got.coefficient[0] / 5, [[0, 0, 0], [-0.05, -0.05, 0]], rtol=1e-6)
    np.testing.assert_allclose(got.metrics["loss/weighted_nll"], got.value)


def test_nothing_correct_adds_nothing():
    scores, batch = toy_rows(outcome=jnp.array([[0.0, 0.0]]))
    loss = Together(loss=load("grpo", kl=None).loss, terms=(partial(weighted_nll, weight=0.1),), tokens=correct_tokens)
    got, want = evaluate(loss, scores, batch), evaluate(load("grpo", kl=None).loss, scores, batch)
    np.testing.assert_allclose(got.coefficient, want.coefficient)
    assert got.value == want.value


def test_vapo_is_vc_ppo_where_lambda_is_one():
    scores, batch = random_batch(jax.random.key(4))
    child = vapo(alpha=jnp.inf, imitation=None, clip_high=0.2)
    same(child, load("vc_ppo", lam=1.0), scores, batch)
    for other in (vapo(alpha=jnp.inf, clip_high=0.2), vapo(imitation=None, clip_high=0.2)):
        assert not np.allclose(run(other, scores, batch)[1], run(child, scores, batch)[1], atol=1e-6)
