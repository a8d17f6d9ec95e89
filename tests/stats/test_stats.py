"""Masked and per-id statistics against numpy."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jaxrl_llm import stats

values = hnp.arrays(np.float32, (3, 5), elements=st.floats(-100, 100, width=32))
masks = hnp.arrays(bool, (3, 5))
ids = hnp.arrays(np.int32, (3, 5), elements=st.integers(0, 3))


@given(x=values, mask=masks, ddof=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_mean_and_variance(x, mask, ddof):
    poisoned = jnp.where(mask, x, jnp.nan)
    chosen = x[mask].astype(np.float64)
    mean = chosen.mean() if mask.any() else 0.0
    var = chosen.var(ddof=ddof) if mask.sum() > ddof else 0.0
    np.testing.assert_allclose(stats.masked_mean(poisoned, mask), mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.masked_var(poisoned, mask, ddof=ddof), var, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats.centered(poisoned, mask), np.where(mask, x - mean, 0), rtol=1e-4, atol=1e-4)


@given(x=values, mask=masks)
@settings(max_examples=30, deadline=None)
def test_along_an_axis_is_one_row_at_a_time(x, mask):
    for fn in (stats.masked_mean, stats.masked_var, stats.whiten, stats.standardise, stats.centered):
        rows = jnp.stack([fn(jnp.asarray(x[i]), jnp.asarray(mask[i])) for i in range(3)])
        np.testing.assert_allclose(fn(jnp.asarray(x), jnp.asarray(mask), axis=-1), rows, rtol=1e-4, atol=1e-4)


@given(x=values, ids=ids, mask=masks, ddof=st.integers(0, 1))
@settings(max_examples=50, deadline=None)
def test_per_id(x, ids, mask, ddof):
    got = stats.segment_statistics(jnp.where(mask, x, jnp.nan), ids, mask, num_segments=5, ddof=ddof)
    for i in range(5):
        chosen = x[mask & (ids == i)].astype(np.float64)
        assert got.size[i] == len(chosen)
        np.testing.assert_allclose(got.mean[i], chosen.mean() if len(chosen) else 0, rtol=1e-4, atol=1e-4)
        std = chosen.std(ddof=ddof) if len(chosen) > ddof else 0.0
        np.testing.assert_allclose(got.std[i], std, rtol=1e-3, atol=1e-2)


@given(x=values, mask=masks)
@settings(max_examples=30, deadline=None)
def test_segments_that_are_rows_are_the_axis(x, mask):
    ids = np.repeat(np.arange(3), 5).reshape(3, 5)
    kwargs = {"ddof": 1, "eps": 1e-2}
    by_id = stats.standardise_segments(jnp.asarray(x), ids, jnp.asarray(mask), num_segments=3, **kwargs)
    by_axis = stats.standardise(jnp.asarray(x), jnp.asarray(mask), axis=-1, **kwargs)
    np.testing.assert_allclose(by_id, by_axis, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(
        stats.center_segments(jnp.asarray(x), ids, jnp.asarray(mask), num_segments=3),
        stats.centered(jnp.asarray(x), jnp.asarray(mask), axis=-1),
        rtol=1e-3,
        atol=1e-3,
    )


def test_singletons_and_equal_values():
    x, ids = jnp.array([0.1, 0.1, 0.1, 5.0, 7.0]), jnp.array([0, 0, 0, 1, 2])
    mask = jnp.array([True, True, True, True, False])
    assert not stats.standardise_segments(x, ids, mask, num_segments=3).any()
    got = stats.standardise_segments(x, ids, mask, num_segments=3, raw_singletons=True)
    np.testing.assert_allclose(got, [0, 0, 0, 5.0, 0])


def test_large_close_values_do_not_cancel():
    x = 1e4 + jnp.array([0.0, 1, 2, 3])
    np.testing.assert_allclose(stats.masked_var(x, jnp.ones(4, bool)), 5 / 3, rtol=1e-6)
    got = stats.segment_statistics(x, jnp.zeros(4, int), jnp.ones(4, bool), num_segments=1)
    np.testing.assert_allclose(got.std, np.sqrt(5 / 3), rtol=1e-6)


def test_whiten_has_eps_under_the_root_and_standardise_outside():
    x, mask = jnp.array([1.0, -1.0]), jnp.ones(2, bool)
    np.testing.assert_allclose(stats.whiten(x, mask, eps=1.0), [1 / np.sqrt(3), -1 / np.sqrt(3)], rtol=1e-6)
    np.testing.assert_allclose(stats.standardise(x, mask, eps=1.0), np.array([1, -1]) / (np.sqrt(2) + 1), rtol=1e-6)


def test_the_mean_has_its_gradient():
    x, mask = jnp.array([3.0, jnp.nan, 5.0]), jnp.array([True, False, True])
    np.testing.assert_allclose(jax.grad(stats.masked_mean)(x, mask), [0.5, 0, 0.5])


@pytest.mark.parametrize(
    ("outcome", "keep", "want"),
    [([1, 0], [1, 1], True), ([1, 1], [1, 1], False), ([0, 0], [1, 1], False), ([1, 0], [1, 0], False)],
)
def test_mixed(outcome, keep, want):
    assert stats.mixed(jnp.array(outcome, float), jnp.array(keep, bool)) == want
