"""The loss and its gradient do not depend on how a step is split: micro-batches, accumulation, devices."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import PolicyLoss, optional
from jaxrl_llm.engine import learner
from jaxrl_llm.losses import aggregate
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.sharding import data_mesh, over_data, replicate
from jaxrl_llm.types import PADDING, POLICY
from jaxrl_llm.updates.optimizer import adamw

AGGREGATIONS = {
    "token_mean": aggregate.token_mean,
    "sequence_mean_token_mean": aggregate.sequence_mean_token_mean,
    "sequence_mean_token_sum": aggregate.sequence_mean_token_sum,
    "token_sum_over": partial(aggregate.token_sum_over, constant=7.0),
}


def ragged(world, key, prompts):
    """Groups of 4 with lengths 0 to T, some rows without any token, and a behaviour that is not the policy's own."""
    rollouts = world.sample(key, prompts, 4)
    b, g, t = rollouts.tokens.shape
    length = jax.random.randint(jax.random.key(7), (b, g, 1), 0, t + 1)
    mask = (jnp.arange(t) < length) & (jnp.arange(b) != 2)[:, None, None]
    return dataclasses.replace(
        rollouts,
        mask=mask,
        role=jnp.where(mask, POLICY, PADDING).astype(jnp.int8),
        logp=rollouts.logp + 0.3 * jax.random.normal(jax.random.key(8), (b, g, t)),
        tokens=jnp.where(mask, rollouts.tokens, 3),
    )


@pytest.fixture(scope="module")
def gradient_of(policy, letters):
    """One plain gradient step at rate 1, so that the parameters' change is the gradient."""

    def of(aggregation, accumulate=1, devices=1):
        import optax

        recipe = dataclasses.replace(
            algorithms.load("grpo"),
            rollout=ragged,
            loss=PolicyLoss(
                surrogate=partial(clip_min, low=0.2, high=0.2),
                aggregate=aggregation,
                terms=optional(kl_to_reference, weight=0.1),
            ),
        )
        mesh = data_mesh(devices)
        parts = learner(
            recipe,
            policy=policy,
            task=letters,
            optimizer=optax.sgd(1.0),
            prompts_per_step=8,
            accumulate=accumulate,
            constrain=over_data(mesh),
            reference=policy.init(jax.random.key(9)),
        )
        state = replicate(mesh, parts.init(jax.random.key(0)))
        new, metrics = jax.jit(parts.step)(state)
        change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params["policy"], state.params["policy"])
        return float(metrics["loss"]), change

    return of


@pytest.fixture(scope="module", params=AGGREGATIONS)
def whole(request, gradient_of):
    aggregation = AGGREGATIONS[request.param]
    return aggregation, gradient_of(aggregation)


def assert_close(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=1e-6, atol=1e-6)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches(whole, gradient_of, accumulate):
    aggregation, expected = whole
    assert np.abs(expected[0]) > 1e-4
    assert_close(gradient_of(aggregation, accumulate=accumulate), expected)


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_data_parallel_shards(whole, gradient_of, devices):
    aggregation, expected = whole
    assert_close(gradient_of(aggregation, devices=devices), expected)


def test_both(whole, gradient_of):
    aggregation, expected = whole
    assert_close(gradient_of(aggregation, accumulate=2, devices=4), expected)
