"""The loss and its gradient do not depend on how a step is split: micro-batches, accumulation, devices."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.accumulate import value_and_grad
from jaxrl_llm.algorithm import PolicyLoss, optional
from jaxrl_llm.engine import learner
from jaxrl_llm.losses import aggregate
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.sharding import data_mesh, place, replicate
from jaxrl_llm.types import PADDING, POLICY, Rollouts, Sampling, Scores
from jaxrl_llm.world import batch_of

AGGREGATIONS = {
    "token_mean": aggregate.token_mean,
    "sequence_mean_token_mean": aggregate.sequence_mean_token_mean,
    "sequence_mean_token_sum": aggregate.sequence_mean_token_sum,
    "token_sum_over": partial(aggregate.token_sum_over, constant=7.0),
}


LOSS = PolicyLoss(surrogate=partial(clip_min, low=0.2, high=0.2), terms=optional(kl_to_reference, weight=0.1))


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
def step_gradient(policy, letters):
    """Loss and gradient of a whole step through the engine: plain descent at rate 1 moves by the gradient."""

    def of(accumulate=1, devices=1):
        recipe = dataclasses.replace(algorithms.load("grpo"), rollout=ragged, loss=LOSS)
        mesh = data_mesh(devices)
        parts = learner(
            recipe,
            policy=policy,
            task=letters,
            optimizer=optax.sgd(1.0),
            prompts_per_step=8,
            accumulate=accumulate,
            mesh=mesh,
            reference=policy.init(jax.random.key(9)),
        )
        state = replicate(mesh, parts.init(jax.random.key(0)))
        new, metrics = jax.jit(parts.step)(state)
        change = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params["policy"], state.params["policy"])
        return float(metrics["loss"]), change

    return of


@pytest.fixture(scope="module")
def loss_gradients(policy, letters, step_rollouts):
    """Loss and gradient by aggregation, all in one program."""
    params, batch = step_rollouts

    def of(accumulate=1, devices=1):
        def objective(params, part):
            return LOSS(policy.score(params, part.rollouts, fields=frozenset({"logp"})), part)

        @jax.jit
        def all_of_them(params, batch):
            def with_share(share):
                both = jax.value_and_grad(objective, has_aux=True)
                (value, _), gradient = value_and_grad(both, params, dataclasses.replace(batch, share=share), accumulate)
                return value, gradient

            # An aggregation is its shares: one after the other, so that the program has each computation once.
            shares = jnp.stack([aggregation(batch.mask) for aggregation in AGGREGATIONS.values()])
            found = jax.lax.map(with_share, shares)
            return {name: jax.tree.map(lambda x, i=i: x[i], found) for i, name in enumerate(AGGREGATIONS)}

        mesh = data_mesh(devices)
        placed = dataclasses.replace(place(mesh, dataclasses.replace(batch, step=None)), step=batch.step)
        return all_of_them(replicate(mesh, params), placed)

    return of


@pytest.fixture(scope="module")
def step_rollouts(policy, letters):
    return jax.jit(partial(drawn_rollouts, policy, letters))()


def drawn_rollouts(policy, letters):
    params = policy.init(jax.random.key(0))
    b, g, t = 8, 4, letters.response_length
    prompts = letters.draw(jax.random.key(1), b)
    keys = jax.random.split(jax.random.key(2), 6)
    mask = (jnp.arange(t) < jax.random.randint(keys[0], (b, g, 1), 0, t + 1)) & (jnp.arange(b) != 2)[:, None, None]
    rollouts = Rollouts(
        prompts=prompts,
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=jax.random.randint(keys[1], (b, g, t), 2, 60),
        mask=mask,
        role=jnp.where(mask, POLICY, PADDING).astype(jnp.int8),
        logp=-4.0 + 0.3 * jax.random.normal(keys[2], (b, g, t)),
        entropy=jnp.zeros((b, g, t)),
        version=jnp.zeros((b, g, t), jnp.int32),
        truncated=jnp.zeros((b, g), bool),
        sampling=jax.tree.map(lambda x: jnp.full((b, g), x), Sampling()),
    )
    batch, _ = batch_of(rollouts, jnp.zeros((b, g)), jnp.zeros((), jnp.int32))
    reference = Scores(logp=-4.0 + 0.3 * jax.random.normal(keys[3], (b, g, t)))
    advantage = jax.random.normal(keys[4], (b, g, t))
    return params, dataclasses.replace(batch, reference=reference, advantage=advantage)


@pytest.fixture(scope="module")
def whole(loss_gradients):
    return loss_gradients()


def assert_close(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


SPLITS = [(2, 1), (4, 1), (8, 1), (1, 2), (1, 4), (1, 8), (2, 4)]


@pytest.mark.parametrize(("accumulate", "devices"), SPLITS)
def test_no_split_changes_loss_or_gradient(whole, loss_gradients, accumulate, devices):
    assert all(np.abs(value) > 1e-4 for value, _ in whole.values())
    assert_close(loss_gradients(accumulate, devices), whole)


def test_nor_does_it_through_the_engine(step_gradient):
    expected = step_gradient()
    assert np.abs(expected[0]) > 1e-4
    assert_close(step_gradient(accumulate=2, devices=4), expected)


def test_a_loss_that_divides_by_its_own_part_would_be_seen(policy, step_rollouts):
    params, batch = step_rollouts

    def wrong(params, part):
        shared = dataclasses.replace(part, share=aggregate.token_mean(part.mask))
        return LOSS(policy.score(params, part.rollouts, fields=frozenset({"logp"})), shared)

    both = jax.value_and_grad(wrong, has_aux=True)
    (one, _), _ = jax.jit(lambda *x: value_and_grad(both, *x, 1))(params, batch)
    (two, _), _ = jax.jit(lambda *x: value_and_grad(both, *x, 2))(params, batch)
    assert abs(float(one) - float(two)) > 1e-3
