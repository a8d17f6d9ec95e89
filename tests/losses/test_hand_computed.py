"""Losses and their gradients on two short rows, computed by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithm import PolicyLoss
from jaxrl_llm.losses import aggregate as agg
from jaxrl_llm.losses import surrogates as sur
from jaxrl_llm.losses.ratio import recomputed, sequence_ratio, sequence_ratio_per_token, token_ratio
from jaxrl_llm.testing import evaluate, toy_rows
from jaxrl_llm.types import Scores

CLIP = partial(sur.clip_min, low=0.2, high=0.2)
HIGHER = partial(sur.clip_min, low=0.2, high=0.28)
TINY = partial(sur.clip_min, low=3e-4, high=4e-4)

TABLE = {
    "reinforce": (PolicyLoss(surrogate=sur.log_likelihood), 0.36, [[-1, -1, -1], [1, 1]]),
    "importance": (
        PolicyLoss(surrogate=sur.unclipped),
        -0.362548,
        [[-1.221403, -0.904837, -1.648721], [0.740818, 1.221403]],
    ),
    "ppo": (PolicyLoss(surrogate=CLIP), -0.256687, [[0, -0.904837, 0], [0, 1.221403]]),
    "clip higher": (PolicyLoss(surrogate=HIGHER), -0.276967, [[-1.221403, -0.904837, 0], [0, 1.221403]]),
    "dual clip": (
        PolicyLoss(surrogate=partial(sur.dual_clip, low=0.2, high=0.2, bound=1.1)),
        -0.280967,
        [[0, -0.904837, 0], [0, 0]],
    ),
    "cispo": (
        PolicyLoss(surrogate=partial(sur.clipped_weight, low=0.2, high=0.28)),
        0.471920,
        [[-1.221403, -0.904837, -1.28], [0.8, 1.221403]],
    ),
    "gspo": (
        PolicyLoss(ratio=sequence_ratio, surrogate=CLIP, aggregate=agg.sequence_mean_token_mean),
        -0.124385,
        [[0, 0, 0], [1.189037, 1.189037]],
    ),
    "gspo token": (
        PolicyLoss(ratio=sequence_ratio_per_token, surrogate=CLIP, aggregate=agg.sequence_mean_token_mean),
        -0.124385,
        [[0, 0, 0], [1.189037, 1.189037]],
    ),
    "gspo, the paper's widths": (
        PolicyLoss(ratio=sequence_ratio, surrogate=TINY, aggregate=agg.sequence_mean_token_mean),
        -0.000350,
        [[0, 0, 0], [0, 0]],
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_value_and_coefficient(name):
    loss, value, coefficient = TABLE[name]
    got = evaluate(loss, *toy_rows())
    np.testing.assert_allclose(got.value, value, atol=2e-6)
    np.testing.assert_allclose(got.coefficient[0, 0], coefficient[0], atol=2e-6)
    np.testing.assert_allclose(got.coefficient[0, 1, :2], coefficient[1], atol=2e-6)
    assert got.coefficient[0, 1, 2] == 0


@pytest.mark.parametrize(
    ("aggregate", "same_clip", "higher"),
    [
        (agg.token_mean, -0.256687, -0.276967),
        (agg.sequence_mean_token_mean, -0.045456, -0.062356),
        (agg.sequence_mean_token_sum, -0.641717, -0.692419),
        (partial(agg.token_sum_over, constant=3), -0.213906, -0.230806),
        (partial(agg.token_sum_over, constant=None), -0.213906, -0.230806),
    ],
)
def test_aggregations_of_one_loss_matrix(aggregate, same_clip, higher):
    for surrogate, value in ((CLIP, same_clip), (HIGHER, higher)):
        got = evaluate(PolicyLoss(surrogate=surrogate, aggregate=aggregate), *toy_rows())
        np.testing.assert_allclose(got.value, value, atol=2e-6)


def test_sequence_ratios():
    scores, batch = toy_rows()
    np.testing.assert_allclose(sequence_ratio(scores, batch)[0, :, 0], [1.221403, 0.951229], atol=1e-6)


@pytest.mark.parametrize(("ratio", "loss"), [(0.5, 0.8), (1.3, 1.3), (4.0, 3.0)])
def test_dual_clip_bounds_a_bad_tokens_loss(ratio, loss):
    one = jnp.array(ratio)
    np.testing.assert_allclose(sur.dual_clip(one, jnp.array(-1.0), one, bound=3.0), loss, rtol=1e-6)


def test_dual_clip_without_bound_is_clip_in_value_and_gradient():
    scores, batch = toy_rows(advantage=jnp.array([[[1.0, 0.0, 1.0], [-1.0, -1.0, 0.0]]]))
    dual = evaluate(PolicyLoss(surrogate=partial(sur.dual_clip, bound=jnp.inf)), scores, batch)
    clip = evaluate(PolicyLoss(surrogate=CLIP), scores, batch)
    np.testing.assert_array_equal(dual.value, clip.value)
    np.testing.assert_array_equal(dual.coefficient, clip.coefficient)


@pytest.mark.parametrize(
    "surrogate", [sur.log_likelihood, sur.unclipped, CLIP, HIGHER, sur.dual_clip, sur.clipped_weight]
)
@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio, sequence_ratio_per_token])
def test_on_policy_every_surrogate_is_reinforce(surrogate, ratio):
    _, batch = toy_rows()
    # With sequence ratios a row's tokens share their gradient, which a mean within rows makes equal.
    got = evaluate(PolicyLoss(surrogate=surrogate, ratio=ratio), Scores(logp=batch.rollouts.logp), batch)
    np.testing.assert_allclose(got.coefficient, -batch.advantage * batch.mask, atol=1e-6)


def test_loss_on_policy_is_minus_the_mean_advantage():
    _, batch = toy_rows()
    got = evaluate(PolicyLoss(surrogate=CLIP), Scores(logp=batch.rollouts.logp), batch)
    np.testing.assert_allclose(got.value, -0.2, atol=1e-6)
    assert not got.metrics["clipped"].any()


def test_missing_old_log_probs_clip_fires_off_policy():
    got = evaluate(PolicyLoss(surrogate=CLIP), *toy_rows())
    np.testing.assert_array_equal(got.metrics["clipped"][0], [[True, False, True], [True, False, False]])


def test_recomputed_log_probs_are_asked_for_in_words():
    scores, batch = toy_rows()
    with pytest.raises(ValueError, match=r"batch\.old"):
        evaluate(PolicyLoss(surrogate=CLIP, ratio=partial(token_ratio, old=recomputed)), scores, batch)


def test_cispo_weight_is_detached():
    scores, batch = toy_rows()
    got = evaluate(PolicyLoss(surrogate=sur.clipped_weight), scores, batch)
    ratio = token_ratio(scores, batch)
    # With the gradient through the weight the coefficient would be -A r (1 + l).
    np.testing.assert_allclose(got.coefficient, -batch.advantage * ratio * batch.mask, rtol=1e-6)


def test_extreme_ratios_are_finite():
    scores, batch = toy_rows(logp=jnp.full((1, 2, 3), -1e4))
    for surrogate in (CLIP, sur.dual_clip, sur.clipped_weight, sur.unclipped):
        for ratio in (token_ratio, sequence_ratio, sequence_ratio_per_token):
            got = evaluate(PolicyLoss(surrogate=surrogate, ratio=ratio), scores, batch)
            assert jnp.isfinite(got.value) and jnp.isfinite(got.coefficient).all()


@pytest.mark.parametrize("name", [n for n in TABLE if n not in ("cispo", "gspo token")])
def test_gradient_is_the_values(name):
    """Surrogates without a stop-gradient: finite differences of the value."""
    loss = TABLE[name][0]
    with jax.enable_x64(True):
        scores, batch = toy_rows()
        scores = Scores(logp=jnp.asarray(np.asarray(scores.logp), jnp.float64))
        got = evaluate(loss, scores, batch)
        for index in [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)]:
            up, down = (evaluate(loss, Scores(logp=scores.logp.at[index].add(h)), batch).value for h in (1e-5, -1e-5))
            np.testing.assert_allclose(got.coefficient[index] / 5, (up - down) / 2e-5, atol=1e-6)
