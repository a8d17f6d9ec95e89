"""Data as rollouts, and plain groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.logged import logged
from jaxrl_llm.testing import toy_prompts
from jaxrl_llm.types import INJECTED, PADDING, Logged, World


def world(**kwargs):
    return World(
        **{"sample": None, "score": None, "reward": None, "models": {}, "step": jnp.asarray(7), "length": 3, **kwargs}
    )


def data():
    tokens = jnp.arange(12).reshape(2, 3, 2)
    mask = jnp.array([[[1, 1], [1, 0], [0, 0]], [[1, 1], [1, 1], [1, 0]]], bool)
    reward = jnp.array([[0.0, 1.0, 9.0], [2.0, 2.0, 3.0]])
    return dataclasses.replace(toy_prompts(2), logged=Logged(tokens=tokens, mask=mask, reward=reward))


def test_logged_rows_are_injected_and_scored_by_the_data():
    prompts = data()
    got = logged(world(), jax.random.key(0), prompts)
    np.testing.assert_array_equal(got.role, jnp.where(prompts.logged.mask, INJECTED, PADDING))
    np.testing.assert_array_equal(got.outcome, prompts.logged.reward)
    np.testing.assert_array_equal(got.tokens, prompts.logged.tokens)
    assert not got.logp.any() and (got.version == 7).all() and not got.truncated.any()
    assert (got.sampling.temperature == 1).all() and got.sampling.temperature.shape == (2, 3)
    assert got.context.tokens.shape == (2, 1, 2)


def test_take_the_best_rows_that_exist_the_first_of_equals():
    one = logged(world(), jax.random.key(0), data(), take=1)
    np.testing.assert_array_equal(one.outcome, [[1.0], [3.0]])
    np.testing.assert_array_equal(one.tokens[:, 0], [[2, 3], [10, 11]])
    two = logged(world(), jax.random.key(0), data(), take=2)
    np.testing.assert_array_equal(two.tokens[1], [[10, 11], [6, 7]])


@pytest.mark.parametrize("take", [0, 4])
def test_take_is_checked(take):
    with pytest.raises(ValueError, match="take must be 1 to 3"):
        logged(world(), jax.random.key(0), data(), take=take)


def test_no_data_is_said():
    with pytest.raises(ValueError, match=r"prompts\.logged"):
        logged(world(), jax.random.key(0), toy_prompts(2))


def test_sample_group_asks_the_world_once():
    asked = []
    key = jax.random.key(3)
    sample_group(world(sample=lambda *args: asked.append(args)), key, toy_prompts(2), size=5)
    assert len(asked) == 1 and asked[0][0] is key and asked[0][2] == 5
    with pytest.raises(ValueError, match="size must be at least 1"):
        sample_group(world(), key, toy_prompts(2), size=0)
