"""Which rows count."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms import load
from jaxrl_llm.filters.basic import correct, distinct, everything, informative, not_truncated
from jaxrl_llm.filters.pairs import best_and_worst
from jaxrl_llm.testing import prepare, toy_batch


def rows(outcome, **kwargs):
    outcome = jnp.asarray(outcome, jnp.float32)
    return toy_batch(logp=jnp.zeros((*outcome.shape, 2)), outcome=outcome, **kwargs)


def test_informative_keeps_mixed_groups_whole():
    got = informative(rows([[1, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 0]]))
    np.testing.assert_array_equal(got, np.repeat([[True], [False], [False], [True]], 3, axis=1))


def test_informative_judges_the_outcome_not_the_shaped_reward():
    """A bonus lifts a wrong answer over the threshold; its group stays uninformative."""
    batch = rows([[0, 0, 0], [1, 0, 0]], reward=[[0.9, -0.5, 0.1], [0.4, -0.5, -1.0]])
    np.testing.assert_array_equal(informative(batch)[:, 0], [False, True])


def test_informative_leaves_out_rows_that_do_not_count():
    batch = rows([[1, 0, 0], [1, 0, 0]], keep=[[True, False, False], [True, True, False]])
    np.testing.assert_array_equal(informative(batch)[:, 0], [False, True])


def test_no_filter_of_groups_splits_one():
    batch = prepare(load("dapo"), rows([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]))
    assert (batch.keep.all(-1) | ~batch.keep.any(-1)).all()


def test_correct_and_not_truncated():
    batch = rows([[1, 0.5, 0, 0.9]], truncated=[[True, False, True, False]])
    np.testing.assert_array_equal(correct(batch)[0], [True, False, False, True])
    np.testing.assert_array_equal(correct(batch, threshold=0.95)[0], [True, False, False, False])
    np.testing.assert_array_equal(not_truncated(batch)[0], [False, True, False, True])
    assert everything(batch).all()


def test_distinct_keeps_the_first_and_compares_only_what_was_written():
    tokens = jnp.array([[[1, 2], [1, 2], [1, 9], [1, 7], [2, 1]]])
    mask = jnp.array([[[1, 1], [1, 1], [1, 0], [1, 0], [1, 1]]], bool)
    batch = toy_batch(logp=jnp.zeros(tokens.shape), tokens=tokens, mask=mask)
    np.testing.assert_array_equal(distinct(batch)[0], [True, False, True, False, True])


def test_distinct_is_idempotent_and_groups_are_apart():
    tokens = jnp.array([[[1, 2], [1, 2]], [[1, 2], [3, 4]]])
    batch = toy_batch(logp=jnp.zeros(tokens.shape), tokens=tokens)
    once = distinct(batch)
    np.testing.assert_array_equal(once, [[True, False], [True, True]])
    np.testing.assert_array_equal(once & distinct(dataclasses.replace(batch, keep=once)), once)


def test_distinct_after_a_filter_keeps_the_first_that_passed():
    tokens = jnp.array([[[1, 2], [1, 2], [1, 2]]])
    batch = toy_batch(logp=jnp.zeros(tokens.shape), tokens=tokens, keep=[[False, True, True]])
    np.testing.assert_array_equal((distinct(batch) & batch.keep)[0], [False, True, False])


def test_rft_never_keeps_a_wrong_row():
    tokens = jnp.array([[[1, 2], [1, 2], [5, 6], [7, 8]]])
    batch = toy_batch(logp=jnp.zeros(tokens.shape), tokens=tokens, outcome=[[1.0, 1.0, 0.0, 1.0]])
    np.testing.assert_array_equal(prepare(load("rft"), batch).keep[0], [True, False, False, True])


def test_best_and_worst_by_reward_and_nothing_of_equal_groups():
    got = best_and_worst(
        rows([[0.2, 0.9, 0.5], [1, 1, 1], [0, 1, 0], [0, 1, 5]], keep=[[True] * 3] * 3 + [[True, True, False]])
    )
    np.testing.assert_array_equal(
        got, [[True, True, False], [False, False, False], [True, True, False], [True, True, False]]
    )
    assert not best_and_worst(rows([[1, 0]], keep=[[True, False]])).any()
