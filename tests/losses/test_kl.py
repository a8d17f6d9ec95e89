"""Divergence estimators: values, gradients, and what their expectations are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithm import PolicyLoss
from jaxrl_llm.algorithms import load
from jaxrl_llm.losses import kl
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.testing import evaluate, toy_rows
from jaxrl_llm.types import Scores

DIFFERENCES = {
    kl.k2: (0.035, [[0.3, -0.2, 0.3], [-0.2, 0.3]]),
    kl.k3: (0.033052, [[0.259182, -0.221403, 0.259182], [-0.221403, 0.259182]]),
    kl.k1_straight_through: (0.1, [[0.3, -0.2, 0.3], [-0.2, 0.3]]),
    kl.k3_straight_through: (0.033052, [[0.3, -0.2, 0.3], [-0.2, 0.3]]),
}


def alone(term):
    """A loss of nothing but the term."""
    loss = PolicyLoss(surrogate=unclipped, terms=(term,))
    scores, batch = toy_rows(advantage=jnp.zeros((1, 2)))
    return evaluate(loss, scores, batch)


@pytest.mark.parametrize("estimator", DIFFERENCES, ids=lambda e: e.__name__)
def test_value_and_gradient(estimator):
    value, coefficient = DIFFERENCES[estimator]
    got = alone(partial(kl.kl_to_reference, weight=1.0, estimator=estimator))
    np.testing.assert_allclose(got.value, value, atol=1e-6)
    np.testing.assert_allclose(got.coefficient[0, 0], coefficient[0], atol=1e-6)
    np.testing.assert_allclose(got.coefficient[0, 1, :2], coefficient[1], atol=1e-6)


def test_ratio_makes_it_unbiased_off_policy():
    got = alone(partial(kl.kl_to_reference, weight=1.0, estimator=kl.k3, ratio=token_ratio))
    np.testing.assert_allclose(got.value, 0.040446, atol=1e-6)
    np.testing.assert_allclose(
        alone(partial(kl.kl_to_reference, weight=2.0, estimator=kl.k3, ratio=token_ratio)).value,
        2 * got.value,
        rtol=1e-6,
    )


@pytest.mark.parametrize("estimator", DIFFERENCES, ids=lambda e: e.__name__)
def test_nothing_at_the_reference(estimator):
    _, batch = toy_rows()
    loss = PolicyLoss(surrogate=unclipped, terms=(partial(kl.kl_to_reference, weight=1.0, estimator=estimator),))
    _, batch = toy_rows(advantage=jnp.zeros((1, 2)))
    got = evaluate(loss, Scores(logp=batch.reference.logp), batch)
    assert got.value == 0 and not got.coefficient.any()


def expected(fn, logits, reference):
    """`sum_a pi(a) fn(d_a)` and the on-policy gradient that differentiates `fn` only, over three actions."""
    logp = jax.nn.log_softmax(logits)
    pi = jax.lax.stop_gradient(jnp.exp(logp))
    return jnp.sum(pi * fn(logp - reference))


def divergence(logits, reference, *, reverse=True):
    logp = jax.nn.log_softmax(logits)
    p, q = (logp, reference) if reverse else (reference, logp)
    return jnp.sum(jnp.exp(p) * (p - q))


LOGITS, REFERENCE = jnp.array([0.3, -0.5, 1.0]), jax.nn.log_softmax(jnp.array([-0.2, 0.4, 0.1]))


def test_values_k1_and_k3_are_unbiased_and_k2_is_not():
    true = divergence(LOGITS, REFERENCE)
    np.testing.assert_allclose(expected(kl.k1, LOGITS, REFERENCE), true, rtol=1e-5)
    np.testing.assert_allclose(expected(kl.k3, LOGITS, REFERENCE), true, rtol=1e-5)
    assert abs(expected(kl.k2, LOGITS, REFERENCE) - true) > 1e-2


def test_k1_as_a_loss_does_nothing_k2_is_reverse_k3_is_forward():
    gradient = {
        e: jax.grad(partial(expected, e))(LOGITS, REFERENCE) for e in (kl.k1, kl.k2, kl.k3, kl.k3_straight_through)
    }
    np.testing.assert_allclose(gradient[kl.k1], 0, atol=1e-6)
    reverse = jax.grad(divergence)(LOGITS, REFERENCE)
    np.testing.assert_allclose(gradient[kl.k2], reverse, atol=1e-6)
    np.testing.assert_allclose(gradient[kl.k3_straight_through], reverse, atol=1e-6)
    forward = jax.grad(partial(divergence, reverse=False))(LOGITS, REFERENCE)
    np.testing.assert_allclose(gradient[kl.k3], forward, atol=1e-6)
    assert jnp.abs(forward - reverse).max() > 1e-2


def test_k1_is_refused_as_a_loss_when_the_recipe_is_built():
    with pytest.raises(ValueError, match="k1 cannot be a loss"):
        load("grpo", kl_estimator=kl.k1)
    with pytest.raises(ValueError, match="k1 cannot be a loss"):
        alone(partial(kl.kl_to_reference, weight=1.0, estimator=partial(kl.k1)))


def test_k1_with_the_ratio_has_the_reverse_gradient():
    """`r * k1` may be a loss: its expected on-policy gradient is that of the divergence."""

    def with_ratio(logits):
        logp = jax.nn.log_softmax(logits)
        pi = jax.lax.stop_gradient(jnp.exp(logp))
        return jnp.sum(pi * jnp.exp(logp - jax.lax.stop_gradient(logp)) * (logp - REFERENCE))

    np.testing.assert_allclose(jax.grad(with_ratio)(LOGITS), jax.grad(divergence)(LOGITS, REFERENCE), atol=1e-6)
    assert jnp.isfinite(alone(partial(kl.kl_to_reference, weight=1.0, estimator=kl.k1, ratio=token_ratio)).value)


def test_no_reference_no_term():
    _, batch = toy_rows(reference=None)
    with pytest.raises(ValueError, match=r"batch\.reference\.logp"):
        kl.kl_to_reference(Scores(logp=batch.rollouts.logp), batch, weight=0.1)


@pytest.mark.parametrize("weight", [None, 0, 0.0])
def test_reference_is_not_paid_for_without_a_weight(weight):
    assert load("grpo", kl=weight).loss.terms == ()
    assert len(load("rloo", kl=weight).reward.stages) == 1
    assert len(load("grpo", kl=jnp.array(0.0)).loss.terms) == 1  # a swept weight stays in the program
