"""Value, entropy and likelihood."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.testing import evaluate, toy_rows
from jaxrl_llm.types import Scores

VALUE = jnp.array([[[0.2, 0.4, 0.5], [0.1, 0.3, 0.0]]])
RETURN = jnp.array([[[1.0, 1.0, 0.55], [0.0, 0.0, 0.0]]])


def test_value_loss_by_hand():
    _, batch = toy_rows(value=VALUE)
    scores = Scores(value=VALUE + jnp.array([[[0.1, 0.5, 0.5], [0.0, -0.25, jnp.nan]]]))
    got = value_loss(scores, batch, returns=lambda batch: RETURN, weight=2.0, clip=0.2)[0]
    # Row 0: inside; towards the target past the clip (pessimistic: the clipped value); past it the other way.
    want = [[(0.3 - 1) ** 2, (0.6 - 1) ** 2, (1.0 - 0.55) ** 2], [0.1**2, 0.1**2, 0]]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_value_clip_stops_the_gradient_towards_the_target_only():
    _, batch = toy_rows(value=VALUE)

    def total(value):
        return value_loss(Scores(value=value), batch, returns=lambda batch: RETURN, weight=1.0, clip=0.2).sum()

    moved = VALUE + jnp.array([[[0.1, 0.5, 0.5], [0.0, -0.25, 0.0]]])
    gradient = jax.grad(total)(moved)[0]
    np.testing.assert_allclose(gradient, [[-0.7, 0.0, 0.45], [0.1, 0.0, 0.0]], atol=1e-6)
    unclipped = jax.grad(
        lambda v: value_loss(Scores(value=v), batch, returns=lambda batch: RETURN, clip=jnp.inf).sum()
    )(moved)[0]
    np.testing.assert_allclose(unclipped, (moved - RETURN)[0] * batch.mask[0], atol=1e-6)


def test_returns_are_detached():
    _, batch = toy_rows(value=VALUE)
    gradient = jax.grad(lambda r: value_loss(Scores(value=VALUE), batch, returns=lambda batch: r).sum())(RETURN)
    assert not gradient.any()


def test_entropy_bonus_pushes_entropy_up():
    _, batch = toy_rows()
    entropy = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, jnp.nan]]])
    term = partial(entropy_bonus, weight=0.5)
    np.testing.assert_allclose(term(Scores(entropy=entropy), batch)[0], [[-0.5, -1, -1.5], [-2, -2.5, 0]])
    gradient = jax.grad(lambda e: term(Scores(entropy=e), batch).sum())(entropy)
    np.testing.assert_array_equal(gradient, jnp.where(batch.mask, -0.5, 0.0))


def test_nll_is_the_token_mean_and_weights_count():
    scores, batch = toy_rows(fill=jnp.nan)
    got = evaluate(NegativeLogLikelihood(), scores, batch)
    np.testing.assert_allclose(got.value, 4.0 / 5, rtol=1e-6)
    np.testing.assert_allclose(got.coefficient[0], [[-1, -1, -1], [-1, -1, 0]], rtol=1e-6)
    _, weighted = toy_rows(fill=jnp.nan, weight=jnp.array([[[2.0, 0.0, 0.0], [1.0, 1.0, jnp.nan]]]))
    np.testing.assert_allclose(evaluate(NegativeLogLikelihood(), scores, weighted).value, 1.7 / 5, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda batch: value_loss(Scores(), batch, returns=lambda b: RETURN), "critic"),
        (lambda batch: entropy_bonus(Scores(), batch, weight=1.0), "scores.entropy"),
        (lambda batch: NegativeLogLikelihood()(Scores(), batch), "scores.logp"),
    ],
)
def test_what_is_missing_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call(toy_rows()[1])
