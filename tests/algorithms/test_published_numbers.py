"""Numbers worked by hand for advantages relative to a median, and to sets of rows."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.mc_grpo import center_median_scale, is_pivot
from jaxrl_llm.algorithms.passk import pass_at_k
from jaxrl_llm.testing import prepare, random_batch

ALL = jnp.ones(5, bool)


def test_median_centred_advantages():
    reward = jnp.array([0.1, 0.4, 0.5, 0.9, 1.0])
    got = center_median_scale(reward, ALL)
    np.testing.assert_allclose(got, [-0.997506, -0.249377, 0, 0.997506, 1.246883], atol=1e-5)
    np.testing.assert_allclose(center_median_scale(reward + 7, ALL), got, atol=1e-4)
    np.testing.assert_array_equal(is_pivot(reward, ALL), [False, False, True, False, False])
    np.testing.assert_array_equal(center_median_scale(jnp.array([1.0, 0, 0, 0, 1]), ALL), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(is_pivot(jnp.array([1.0, 0, 0, 0, 1]), ALL), [False, True, False, False, False])
    with pytest.raises(ValueError, match="even"):
        load("mc_grpo", group_size=7)


def test_the_pivot_leaves_numerator_and_denominator():
    _, batch = random_batch(jax.random.key(3), size=5)
    prepared = prepare(load("mc_grpo", group_size=4), batch)
    left = prepared.rollouts.mask & prepared.keep[..., None] & ~prepared.mask
    assert (left.any(-1).sum(-1) == 1).all()
    assert (jnp.where(left, prepared.advantage, 0) == 0).all()


@pytest.mark.parametrize(
    "size, wrong, k, positive, negative",
    [(8, 6, 4, 0.522232, -0.174077), (8, 4, 4, 0.120385, -0.120385), (4, 3, 2, 0.999998, -0.333333), (8, 7, 8, 0, 0)],
)
def test_pass_at_k(size, wrong, k, positive, negative):
    reward = jnp.arange(size) >= wrong
    got = pass_at_k(reward.astype(jnp.float32), jnp.ones(size, bool), k=k)
    np.testing.assert_allclose(got, jnp.where(reward, positive, negative), atol=2e-5)
    np.testing.assert_allclose(got.sum(), 0, atol=1e-4)


def test_pass_at_1_is_standardised_by_the_population():
    reward = jnp.array([1.0, 0, 0, 0])
    got = pass_at_k(reward, jnp.ones(4, bool), k=1)
    np.testing.assert_allclose(got, [1.732047, *[-0.577349] * 3], atol=1e-4)
    with pytest.raises(ValueError, match="k must be"):
        load("passk", group_size=4, k=5)


def test_pass_at_k_is_the_mean_over_all_sets():
    """Enumerated: each sample's mean advantage over the sets it is in, rewards of sets centred and scaled by theirs."""
    reward = np.array([1, 0, 0, 1, 0, 0])
    sets = list(itertools.combinations(range(6), 3))
    paid = np.array([max(reward[list(s)]) for s in sets], float)
    mean, std = paid.mean(), paid.std()
    want = [np.mean([(p - mean) / std for s, p in zip(sets, paid, strict=True) if i in s]) for i in range(6)]
    np.testing.assert_allclose(pass_at_k(jnp.array(reward, jnp.float32), jnp.ones(6, bool), k=3), want, atol=1e-4)
