"""Rewards."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load
from jaxrl_llm.rewards.basic import at_last_token, signed, token_rewards_so_far
from jaxrl_llm.rewards.kl import kl_in_reward
from jaxrl_llm.rewards.length import overlong, punishment
from jaxrl_llm.testing import prepare, toy_batch, toy_rows
from jaxrl_llm.types import OBSERVATION, PADDING, POLICY


def test_overlong_punishment_by_hand():
    got = punishment(jnp.array([0, 16384, 17408, 18432, 20480, 21000]), 20480, 4096)
    np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -1, -1])


def test_overlong_defaults_scale_the_papers_with_the_budget():
    batch = toy_batch(logp=jnp.zeros((1, 3, 10)), mask=jnp.arange(10) < jnp.array([[[8], [9], [10]]]))
    np.testing.assert_allclose(overlong(batch).sum(-1)[0], [0, -0.5, -1])


def test_length_is_in_tokens_the_policy_wrote():
    """Not in characters, and tool output costs nothing."""
    role = jnp.array([[[POLICY, OBSERVATION, OBSERVATION, POLICY], [POLICY, POLICY, POLICY, POLICY]]])
    batch = toy_batch(logp=jnp.zeros((1, 2, 4)), mask=role == POLICY, role=role)
    np.testing.assert_allclose(overlong(batch, limit=4, cache=2).sum(-1)[0], [0, -1])


@pytest.mark.parametrize("kwargs", [{"limit": 4, "cache": 5}, {"limit": 4, "cache": 0}])
def test_overlong_bounds_are_checked(kwargs):
    with pytest.raises(ValueError, match="cache must be 1 to limit"):
        overlong(toy_rows()[1], **kwargs)


def test_dapo_adds_the_punishment_to_plus_or_minus_one():
    mask = jnp.arange(5) < jnp.array([[[2], [4], [5]]])
    batch = toy_batch(logp=jnp.zeros(mask.shape), mask=mask, outcome=[[1.0, 0.0, 1.0]])
    got = prepare(load("dapo", limit=5, cache=2), batch)
    np.testing.assert_allclose(got.reward[0], [1, -1.5, 0])
    np.testing.assert_allclose(signed(batch)[0], [1, -1, 1])


def test_a_reward_sits_on_the_last_token_that_counts():
    mask = jnp.array([[1, 1, 0], [1, 0, 1], [0, 0, 0]], bool)
    np.testing.assert_array_equal(at_last_token(mask, jnp.array([5.0, 6, 7])), [[0, 5, 0], [0, 0, 6], [0, 0, 0]])


def test_kl_in_the_reward():
    _, batch = toy_rows(fill=jnp.nan)
    fresh = dataclasses.replace(batch, reward=None, token_reward=None)
    want = np.array([[-0.01, 0.01, 1.02], [-0.01, -0.01, 0.0]])
    np.testing.assert_allclose(kl_in_reward(fresh, weight=0.1)[0], want, atol=1e-6)
    np.testing.assert_allclose(kl_in_reward(batch, weight=0.1)[0], want, atol=1e-6)


def test_kl_is_charged_only_for_tokens_the_policy_chose():
    role = jnp.array([[[POLICY, OBSERVATION, PADDING]]])
    batch = toy_batch(
        logp=jnp.zeros((1, 1, 3)), mask=role != PADDING, role=role, reference=jnp.full((1, 1, 3), -1.0), outcome=[[0.0]]
    )
    np.testing.assert_allclose(kl_in_reward(batch, weight=1.0)[0, 0], [-1.0, 0.0, 0.0])


def test_kl_comes_before_the_baseline():
    """Leave-one-out of rewards that already paid for their divergence."""
    _, batch = toy_rows()
    batch = prepare(load("rloo", kl=0.1), batch)
    np.testing.assert_allclose(batch.reward[0], [1.02, -0.02], atol=1e-6)
    np.testing.assert_allclose(batch.advantage[0, :, 0], [1.04, -1.04], atol=1e-6)


def test_stages_keep_what_was_placed_before():
    _, batch = toy_rows(reward=jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, jnp.nan]]]))
    np.testing.assert_allclose(token_rewards_so_far(batch)[0], [[1, 2, 3], [4, 5, 0]])
    np.testing.assert_allclose(overlong(batch, limit=3, cache=1)[0], [[1, 2, 2], [4, 5, 0]])


def test_no_reference_is_said():
    with pytest.raises(ValueError, match=r"batch\.reference\.logp"):
        kl_in_reward(toy_rows(reference=None)[1], weight=0.1)
