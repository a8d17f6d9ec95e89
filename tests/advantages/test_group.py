"""Credit relative to the group."""

from functools import partial

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jaxrl_llm.advantages.baseline import batch_mean
from jaxrl_llm.advantages.basic import raw, uniform
from jaxrl_llm.advantages.group import center, center_scale, leave_one_out, per_group
from jaxrl_llm.testing import toy_batch

KEEP = jnp.ones(4, bool)
ONE_RIGHT = jnp.array([1.0, 0, 0, 0])
FUNCTIONS = [center, center_scale, leave_one_out]
floats = st.floats(-8, 8, width=32)
rewards, keeps = hnp.arrays(np.float32, 6, elements=floats), hnp.arrays(bool, 6)


@pytest.mark.parametrize(
    ("fn", "want"),
    [
        (center_scale, [1.499997, -0.499999, -0.499999, -0.499999]),
        (partial(center_scale, ddof=0), [1.732047, -0.577349, -0.577349, -0.577349]),
        (partial(center_scale, eps=1e-4), [1.4997, -0.4999, -0.4999, -0.4999]),
        (center, [0.75, -0.25, -0.25, -0.25]),
        (leave_one_out, [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_by_hand(fn, want):
    np.testing.assert_allclose(fn(ONE_RIGHT, KEEP), want, atol=5e-7)


def test_standard_deviation_is_unbiased_unless_told():
    assert not np.allclose(center_scale(ONE_RIGHT, KEEP), center_scale(ONE_RIGHT, KEEP, ddof=0))


def test_leave_one_out_of_two_is_the_difference():
    np.testing.assert_allclose(leave_one_out(jnp.array([3.0, 1.0]), jnp.ones(2, bool)), [2.0, -2.0])


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a_group_of_one_has_no_advantage(fn):
    keep = jnp.array([False, True, False, False])
    reward = jnp.array([9.0, 5.0, 9.0, 9.0])
    np.testing.assert_array_equal(fn(reward, keep), 0)
    np.testing.assert_allclose(fn(reward, keep, raw_singletons=True), [0, 5, 0, 0])
    np.testing.assert_array_equal(fn(reward, jnp.zeros(4, bool)), 0)


@pytest.mark.parametrize("fn", FUNCTIONS)
@given(reward=rewards, keep=keeps)
@settings(max_examples=40, deadline=None)
def test_sums_to_zero_over_the_kept_and_is_zero_elsewhere(fn, reward, keep):
    got = np.asarray(fn(jnp.asarray(reward), jnp.asarray(keep)))
    np.testing.assert_allclose(got[keep].sum(), 0, atol=2e-4)
    assert (got[~keep] == 0).all()


@pytest.mark.parametrize("fn", FUNCTIONS)
@given(reward=rewards, keep=keeps, shift=floats)
@settings(max_examples=40, deadline=None)
def test_a_shift_of_all_rewards_changes_nothing(fn, reward, keep, shift):
    reward = np.round(reward * 8) / 8  # exactly representable after the shift, so no rounding to divide by a small std
    shift = np.round(np.float32(shift))
    a, b = (np.asarray(fn(jnp.asarray(r), jnp.asarray(keep))) for r in (reward, reward + shift))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@given(reward=rewards, scale=st.floats(0.25, 4, width=32))
@settings(max_examples=40, deadline=None)
def test_center_scale_ignores_the_scale(reward, scale):
    keep = np.ones(6, bool)
    a, b = (np.asarray(center_scale(jnp.asarray(r), jnp.asarray(keep), eps=0.0)) for r in (reward, reward * scale))
    if reward.std() > 1e-2:
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("fn", FUNCTIONS)
@given(reward=rewards, keep=keeps, order=st.permutations(range(6)))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter(fn, reward, keep, order):
    order = np.array(order)
    got = np.asarray(fn(jnp.asarray(reward), jnp.asarray(keep)))
    moved = np.asarray(fn(jnp.asarray(reward[order]), jnp.asarray(keep[order])))
    np.testing.assert_allclose(moved, got[order], rtol=1e-3, atol=1e-4)


def test_leave_one_out_and_std_do_not_cancel_on_large_close_rewards():
    """`E[x^2] - E[x]^2` gives 0 or NaN here in float32."""
    reward = 10000.0 + jnp.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(leave_one_out(reward, KEEP), np.array([-1.5, -0.5, 0.5, 1.5]) * 4 / 3, rtol=1e-6)
    np.testing.assert_allclose(center_scale(reward, KEEP), np.array([-1.5, -0.5, 0.5, 1.5]) / 1.2909944, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 5, 6, 7, 11])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 123.456, 1e-6, 1e8])
def test_equal_rewards_give_exactly_zero(size, value):
    for fn in FUNCTIONS:
        assert not fn(jnp.full(size, value), jnp.ones(size, bool)).any()


def test_per_group_reaches_the_tokens_that_count():
    mask = jnp.array([[[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]]], bool)
    batch = toy_batch(logp=jnp.zeros(mask.shape), mask=mask, outcome=[[1.0, 0.0], [5.0, 9.0]])
    got = per_group(center, batch)
    # The second group's other row is empty: a group of one.
    np.testing.assert_allclose(got, [[[0.5, 0.5, 0], [-0.5, 0, 0]], [[0, 0, 0], [0, 0, 0]]])


def test_rows_that_are_not_kept_are_in_no_statistic():
    batch = toy_batch(logp=jnp.zeros((1, 3, 1)), outcome=[[1.0, 0.0, jnp.nan]], keep=[[True, True, False]])
    np.testing.assert_allclose(per_group(center, batch)[0, :, 0], [0.5, -0.5, 0.0])
    np.testing.assert_allclose(batch_mean(batch)[0, :, 0], [0.5, -0.5, 0.0])
    np.testing.assert_allclose(raw(batch)[0, :, 0], [1.0, 0.0, 0.0])
    np.testing.assert_allclose(uniform(batch)[0, :, 0], [1.0, 1.0, 0.0])


def test_the_reward_is_read_not_the_outcome():
    batch = toy_batch(logp=jnp.zeros((1, 2, 1)), outcome=[[0.0, 0.0]], reward=[[3.0, 1.0]])
    np.testing.assert_allclose(per_group(center, batch)[0, :, 0], [1.0, -1.0])
