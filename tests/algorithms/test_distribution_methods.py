"""NLPO: a policy restricted to the nucleus of its lagged copy."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load, nlpo
from jaxrl_llm.policy import language_model
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_world, whole_step
from jaxrl_llm.updates.lagged import renewed_copy

LAGGED, NOW = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
BOUND = {"mass": 0.9, "least": 1, "always": ()}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        ({}, [1, 1, 1, 0]),
        ({"mass": 0.75}, [1, 1, 0, 0]),
        ({"mass": 0.1}, [1, 0, 0, 0]),
        ({"mass": 0.1, "least": 3}, [1, 1, 1, 0]),
        ({"mass": 0.1, "always": (3,)}, [1, 0, 0, 1]),
        ({"mass": 1.0}, [1, 1, 1, 1]),
    ],
)
def test_the_nucleus(changed, kept):
    np.testing.assert_array_equal(nlpo.nucleus(LAGGED, **(BOUND | changed)), np.array(kept, bool))


def test_the_policy_is_renormalised_over_it():
    def logp(logits, token):
        return nlpo.nucleus_logp(logits, token, None, lagged=LAGGED, allow=partial(nlpo.nucleus, **BOUND))

    tokens = jnp.arange(3)
    p, slope = jax.vmap(jax.value_and_grad(logp), (None, 0))(NOW, tokens)
    np.testing.assert_allclose(jnp.exp(p), [1 / 6, 1 / 3, 1 / 2], rtol=1e-5)
    np.testing.assert_allclose(slope, np.eye(3, 4) - [1 / 6, 1 / 3, 1 / 2, 0], atol=1e-6)
    np.testing.assert_allclose(jnp.exp(logp(NOW, jnp.array(3))), 0.4, rtol=1e-5)  # finite, though it could not be drawn
    hot = nlpo.nucleus_logp(NOW, tokens, None, lagged=LAGGED, temperature=2.0, allow=partial(nlpo.nucleus, **BOUND))
    np.testing.assert_allclose(jnp.exp(hot), np.sqrt([0.1, 0.2, 0.3]) / np.sqrt([0.1, 0.2, 0.3]).sum(), rtol=1e-5)


def test_without_a_nucleus_it_is_ppo():
    everything = partial(nlpo.nucleus, **(BOUND | {"mass": 1.0}))
    everything = nlpo.nucleus_logp(NOW, jnp.arange(4), None, lagged=LAGGED, allow=everything)
    np.testing.assert_allclose(everything, NOW, rtol=1e-5)
    child, parent = load("nlpo", mass=1.0), load("ppo", kl=0.001)
    scores, batch = random_batch(jax.random.key(3))
    batch = prepare(child, batch)
    np.testing.assert_array_equal(batch.advantage, prepare(parent, batch).advantage)

    shared = whole_step(child.loss, scores, batch)

    def loss(x):
        return child.loss(dataclasses.replace(scores, extras={"nucleus_logp": x}), shared)

    (value, _), slope = jax.value_and_grad(loss, has_aux=True)(scores.logp)
    want = evaluate(parent.loss, scores, batch)
    np.testing.assert_allclose(value, want.value, rtol=1e-6)
    np.testing.assert_allclose(slope * batch.mask.sum(), want.coefficient, rtol=1e-5, atol=1e-6)
    assert want.coefficient.any()


def test_it_samples_in_the_nucleus_and_training_finds_the_same_log_probs(tiny, task):
    policy = language_model(tiny)
    own, other = (jax.tree.map(lambda x: 4 * x, policy.init(jax.random.key(i))) for i in (0, 1))
    prompts = task.draw(jax.random.key(2), 4)
    allow = partial(nlpo.nucleus, **(BOUND | {"mass": 0.5}))
    found = []
    for slots in (None, 3):
        world = toy_world(language_model(tiny, slots=slots), task, own, length=6)
        world = dataclasses.replace(world, models={"policy": own, "lagged": other})
        sample = jax.jit(lambda key, prompts, world=world: nlpo.sample_within(world, key, prompts, size=2, allow=allow))
        found.append(sample(jax.random.key(3), prompts))
    rollouts = found[0]
    np.testing.assert_array_equal(rollouts.tokens, found[1].tokens)  # slot refill carries both caches

    measures = {
        "nucleus_logp": partial(nlpo.nucleus_logp, allow=allow),
        "inside": lambda logits, tokens, hidden, *, lagged: jnp.take_along_axis(allow(lagged), tokens[..., None], -1)[
            ..., 0
        ],
        "share": lambda logits, tokens, hidden, *, lagged: allow(lagged).mean(-1),
    }
    lagged = other, policy.hidden(other, rollouts)
    extras = policy.score(own, rollouts, frozenset(measures), measures=measures, others={"lagged": lagged}).extras
    assert extras["inside"][rollouts.mask].all()
    assert extras["share"][rollouts.mask].mean() < 0.6  # there is something to leave out
    np.testing.assert_allclose(extras["nucleus_logp"], rollouts.logp, rtol=1e-4, atol=1e-5)
    plain = policy.score(own, rollouts, frozenset({"logp"})).logp
    assert (plain[rollouts.mask] < rollouts.logp[rollouts.mask] - 0.1).any()


@pytest.mark.parametrize(("step", "renewed"), [(0, False), (1, True), (2, False), (3, True)])
def test_the_copy_is_renewed_every_second_step(step, renewed):
    def learn(models, batch):
        return ({**models[0], "policy": models[0]["policy"] + 1}, models[1]), {}

    batch = dataclasses.replace(toy_batch(logp=jnp.zeros((1, 1, 1))), step=jnp.asarray(step))
    models = {"policy": jnp.array(5.0), "lagged": jnp.array(0.0)}, {}
    (params, _), _ = renewed_copy(jax.random.key(0), models, batch, learn, every=2)
    assert params["policy"] == 6 and params["lagged"] == (6 if renewed else 0)


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="least and every must be at least 1, got 0 and 20"):
        load("nlpo", least=0)
    with pytest.raises(ValueError, match="no measure"):
        renewed_copy(None, ({"policy": 0.0}, {}), None, lambda models, batch: (models, {}), every=1)
