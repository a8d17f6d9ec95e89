"""How much each token counts."""

from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from jaxrl_llm.losses import aggregate as agg

MEANS = [agg.token_mean, agg.group_mean_token_mean, agg.sequence_mean_token_mean]
ALL = [*MEANS, agg.sequence_mean_token_sum, partial(agg.token_sum_over, constant=7.0), agg.pair_mean]
masks = hnp.arrays(bool, (3, 2, 4), elements=st.booleans())


@pytest.mark.parametrize("aggregate", ALL, ids=lambda f: getattr(f, "func", f).__name__)
@given(mask=masks)
@settings(max_examples=20, deadline=None)
def test_masked_tokens_have_no_share_and_nothing_is_nan(aggregate, mask):
    share = np.asarray(aggregate(jnp.asarray(mask)))
    assert np.isfinite(share).all() and (share[~mask] == 0).all() and (share >= 0).all()


@pytest.mark.parametrize("aggregate", [*MEANS, agg.pair_mean], ids=lambda f: getattr(f, "func", f).__name__)
@given(mask=masks)
@settings(max_examples=20, deadline=None)
def test_means_sum_to_one(aggregate, mask):
    some = mask.any(-1).all(-1).any() if aggregate is agg.pair_mean else mask.any()
    np.testing.assert_allclose(np.asarray(aggregate(jnp.asarray(mask))).sum(), 1.0 if some else 0.0, rtol=1e-5)


def test_token_mean_has_no_extra_batch_factor():
    """B > 1, unequal lengths, asymmetric losses: the sum over all tokens divided by their number, once."""
    mask = jnp.array([[[1, 1, 1, 1]], [[1, 0, 0, 0]], [[1, 1, 0, 0]]], bool)
    loss = jnp.array([[[1.0] * 4], [[10.0] * 4], [[-2.0] * 4]])
    np.testing.assert_allclose((agg.token_mean(mask) * loss).sum(), (4 + 10 - 4) / 7, rtol=1e-6)
    np.testing.assert_allclose((agg.sequence_mean_token_mean(mask) * loss).sum(), (1 + 10 - 2) / 3, rtol=1e-6)
    np.testing.assert_allclose((agg.sequence_mean_token_sum(mask) * loss).sum(), (4 + 10 - 4) / 3, rtol=1e-6)


def test_group_mean_differs_from_token_mean():
    mask = jnp.array([[[1, 1], [1, 1]], [[1, 0], [0, 0]]], bool)
    np.testing.assert_allclose(agg.group_mean_token_mean(mask)[0, 0, 0], 1 / 8)
    np.testing.assert_allclose(agg.group_mean_token_mean(mask)[1, 0, 0], 1 / 2)


@pytest.mark.parametrize("aggregate", ALL, ids=lambda f: getattr(f, "func", f).__name__)
def test_padding_on_the_right_changes_nothing(aggregate):
    mask = jax.random.bernoulli(jax.random.key(0), 0.6, (3, 2, 4))
    longer = jnp.pad(mask, ((0, 0), (0, 0), (0, 5)))
    np.testing.assert_array_equal(aggregate(longer)[..., :4], aggregate(mask))


def test_constant_does_not_depend_on_a_rows_own_length():
    short, long = jnp.array([[[1, 0, 0], [1, 1, 1]]], bool), jnp.array([[[1, 1, 1], [1, 1, 1]]], bool)
    assert agg.token_sum_over(short)[0, 0, 0] == agg.token_sum_over(long)[0, 0, 0]


def test_pairs_share_equally():
    mask = jnp.array([[[1, 1], [1, 0]], [[1, 0], [1, 0]], [[1, 1], [0, 0]]], bool)
    np.testing.assert_allclose(agg.pair_mean(mask).sum((-2, -1)), [0.5, 0.5, 0.0], rtol=1e-6)
