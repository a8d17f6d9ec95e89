"""Credit that differs by token, and normalisation over the batch."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jaxrl_llm.advantages.baseline import running_mean
from jaxrl_llm.advantages.gae import gae, returns, sequence_gae
from jaxrl_llm.advantages.returns import reward_to_go, rewards_to_go
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import load
from jaxrl_llm.testing import prepare, toy_batch, toy_rows

floats = st.floats(-4, 4, width=32)
rows = hnp.arrays(np.float32, 7, elements=floats)
masks = hnp.arrays(bool, 7)


def loop(reward, value, mask, gamma, lam):
    """GAE as written in textbooks, on the tokens that count only."""
    out, following, advantage = np.zeros(len(reward)), 0.0, 0.0
    for t in reversed(range(len(reward))):
        if mask[t]:
            advantage = reward[t] + gamma * following - value[t] + gamma * lam * advantage
            following, out[t] = value[t], advantage
    return out


def test_gae_by_hand():
    got = sequence_gae(jnp.array([0.0, 0, 1]), jnp.array([0.2, 0.4, 0.5]), jnp.ones(3, bool), gamma=1.0, lam=0.95)
    np.testing.assert_allclose(got, [0.74625, 0.575, 0.5], rtol=1e-6)


@given(reward=rows, value=rows, mask=masks, gamma=st.floats(0, 1, width=32), lam=st.floats(0, 1, width=32))
@settings(max_examples=60, deadline=None)
def test_gae_is_the_loop_over_the_tokens_that_count(reward, value, mask, gamma, lam):
    poisoned = [jnp.where(mask, x, jnp.nan) for x in (reward, value)]
    got = sequence_gae(*poisoned, jnp.asarray(mask), gamma=gamma, lam=lam)
    np.testing.assert_allclose(got, loop(reward, value, mask, gamma, lam), rtol=1e-4, atol=1e-4)


@given(reward=rows, mask=masks, gamma=st.floats(0, 1, width=32))
@settings(max_examples=40, deadline=None)
def test_gae_without_a_critic_is_the_reward_to_go(reward, mask, gamma):
    one = sequence_gae(jnp.asarray(reward), jnp.zeros(7), jnp.asarray(mask), gamma=gamma, lam=1.0)
    two = rewards_to_go(jnp.where(mask, reward, jnp.nan), jnp.asarray(mask), gamma=gamma)
    np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_tool_output_between_turns_is_stepped_over_undiscounted():
    mask = jnp.array([True, False, False, True])
    got = rewards_to_go(jnp.array([0.0, 9.0, 9.0, 1.0]), mask, gamma=0.5)
    np.testing.assert_allclose(got, [0.5, 0, 0, 1.0])


def test_returns_are_advantages_plus_values_for_every_row():
    value = jnp.array([[[0.2, 0.4, 0.5], [0.1, 0.3, jnp.nan]]])
    batch = toy_batch(logp=jnp.zeros((1, 2, 3)), mask=[[[1, 1, 1], [1, 1, 0]]], outcome=[[1.0, 2.0]], value=value)
    advantage = gae(batch, gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantage[0, 0], [0.74625, 0.575, 0.5], rtol=1e-6)
    np.testing.assert_allclose(advantage[0, 1], [0.2 + 0.95 * 1.7, 1.7, 0.0], rtol=1e-6)
    np.testing.assert_allclose(returns(batch, gamma=1.0, lam=0.95)[0, 0], [0.94625, 0.975, 1.0], rtol=1e-6)
    np.testing.assert_allclose(returns(batch, gamma=1.0, lam=1.0)[0], [[1, 1, 1], [2, 2, 0]], rtol=1e-6)


def test_reinforce_pp_by_hand():
    algorithm = load("reinforce_pp", kl=0.01)
    _, batch = toy_rows()
    batch = prepare(algorithm, batch)
    # k1 is between the sampler and the reference; these rows were sampled by the policy that has l - l_ref as here.
    k1 = np.array([[0.1, -0.1, -0.2], [0.1, 0.1, 0]])
    reward = -0.01 * k1 + np.array([[0, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(batch.token_reward[0], reward, atol=1e-6)
    np.testing.assert_allclose(batch.advantage[batch.mask].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(np.asarray(batch.advantage[batch.mask]), ddof=1), 1, rtol=1e-5)


def test_reinforce_pp_returns_and_whitening_by_hand():
    """The same rows sampled by the current policy: k1 is .3, -.2, .3 and -.2, .3."""
    scores, _ = toy_rows()
    _, batch = toy_rows(logp=scores.logp)
    batch = prepare(load("reinforce_pp", kl=0.01), batch)
    np.testing.assert_allclose(
        reward_to_go(batch, gamma=1.0)[0], [[0.996, 0.999, 0.997], [-0.001, -0.003, 0]], atol=1e-6
    )
    np.testing.assert_allclose(
        batch.advantage[0], [[0.727859, 0.733340, 0.729686], [-1.093615, -1.097269, 0]], atol=2e-6
    )


def test_reinforce_pp_baseline_by_hand():
    _, batch = toy_rows()
    batch = prepare(load("reinforce_pp_baseline", kl=None), batch)
    np.testing.assert_allclose(batch.advantage[0], [[0.730297] * 3, [-1.095445, -1.095445, 0]], atol=2e-6)


def test_whitening_is_over_all_tokens_not_rows_or_groups():
    mask = jnp.array([[[1, 1, 1]], [[1, 0, 0]]], bool)
    batch = toy_batch(logp=jnp.zeros(mask.shape), mask=mask, advantage=[[1.0], [-1.0]])
    np.testing.assert_allclose(whiten(batch)[0, 0], [0.5] * 3, rtol=1e-6)
    np.testing.assert_allclose(whiten(batch)[1, 0], [-1.5, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("count", [0, 1])
def test_whitening_nothing_or_one_token_is_zero(count):
    mask = jnp.arange(3)[None, None] < count
    assert not whiten(toy_batch(logp=jnp.zeros((1, 1, 3)), mask=mask, advantage=[[7.0]])).any()


def test_whitening_constants_is_exactly_zero():
    assert not whiten(toy_batch(logp=jnp.zeros((1, 3, 3)), advantage=[[0.1] * 3])).any()


def test_running_mean_is_of_earlier_steps():
    stage = running_mean(decay=0.5)
    batch = toy_batch(logp=jnp.zeros((1, 2, 1)), outcome=[[1.0, 3.0]])
    memory = stage.init(None)
    first, memory = stage.apply(memory, jax.random.key(0), batch)
    np.testing.assert_allclose(first[0, :, 0], [1.0, 3.0])
    memory = stage.observe(memory, batch)
    np.testing.assert_allclose(stage.apply(memory, jax.random.key(0), batch)[0][0, :, 0], [-1.0, 1.0], rtol=1e-6)
    empty = toy_batch(logp=jnp.zeros((1, 2, 1)), outcome=[[9.0, 9.0]], keep=[[False, False]])
    np.testing.assert_allclose(stage.observe(memory, empty)["mean"], memory["mean"])


@pytest.mark.parametrize("fn", [whiten, gae, returns, reward_to_go])
def test_what_is_missing_is_said(fn):
    batch = toy_batch(logp=jnp.zeros((1, 1, 1)))
    bare = type(batch)(rollouts=batch.rollouts, step=batch.step, outcome=batch.outcome)
    with pytest.raises(ValueError, match="batch"):
        fn(bare)


def test_gamma_and_lam_may_be_swept():
    _, batch = toy_rows(value=jnp.full((1, 2, 3), 0.3))
    swept = jax.vmap(lambda lam: gae(batch, gamma=1.0, lam=lam))(jnp.array([0.0, 0.5, 1.0]))
    for i, lam in enumerate((0.0, 0.5, 1.0)):
        np.testing.assert_allclose(swept[i], partial(gae, gamma=1.0, lam=lam)(batch), rtol=1e-6)
