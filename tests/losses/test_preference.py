"""Pair losses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.algorithms import load
from jaxrl_llm.losses.preference import PreferenceLoss, logistic
from jaxrl_llm.testing import evaluate, prepare, toy_batch
from jaxrl_llm.types import Scores


def pair(*, outcome=((1.0, 0.0),)):
    """Summed log-probs -12 and -15, of the reference -13 and -14, over 10 and 20 tokens."""
    mask = jnp.arange(20) < jnp.array([[[10], [20]]])
    lengths = jnp.array([[[10.0], [20.0]]])
    logp = jnp.where(mask, jnp.array([[[-12.0], [-15.0]]]) / lengths, jnp.nan)
    reference = jnp.where(mask, jnp.array([[[-13.0], [-14.0]]]) / lengths, jnp.nan)
    return Scores(logp=logp), toy_batch(logp=jnp.zeros(mask.shape), mask=mask, reference=reference, outcome=outcome)


def run(scores, batch, **kwargs):
    algorithm = load("dpo", **kwargs)
    return evaluate(algorithm.loss, scores, prepare(algorithm, batch))


def test_value_and_gradient_by_hand():
    got = run(*pair())
    np.testing.assert_allclose(got.value, 0.598139, atol=1e-6)
    gradient = got.coefficient / 30
    np.testing.assert_allclose(gradient[0, 0, :10], -0.045017, atol=1e-6)
    np.testing.assert_allclose(gradient[0, 1], 0.045017, atol=1e-6)
    np.testing.assert_allclose(got.metrics["preference/margin"], 2.0, rtol=1e-5)
    np.testing.assert_allclose(got.metrics["preference/accuracy"], 1.0, rtol=1e-5)


def test_at_the_reference_the_loss_is_log_2():
    _, batch = pair()
    np.testing.assert_allclose(run(Scores(logp=batch.reference.logp), batch).value, np.log(2), rtol=1e-6)


def test_a_shift_of_both_log_probs_changes_nothing():
    scores, batch = pair()
    # The same f(x) on both rows: spread evenly over the tokens of each.
    shift = 3.0 / batch.mask.sum(-1, keepdims=True)
    np.testing.assert_allclose(run(Scores(logp=scores.logp + shift), batch).value, run(scores, batch).value, rtol=1e-5)


def test_swapping_chosen_and_rejected_flips_the_gradient():
    scores, batch = pair()
    _, swapped = pair(outcome=[[0.0, 1.0]])
    at = Scores(logp=batch.reference.logp)
    np.testing.assert_allclose(run(at, batch).coefficient, -run(at, swapped).coefficient, rtol=1e-5)
    np.testing.assert_allclose(run(scores, swapped).value, np.log1p(np.exp(0.2)), rtol=1e-5)


def test_label_smoothing():
    scores, batch = pair()
    want = 0.9 * np.log1p(np.exp(-0.2)) + 0.1 * np.log1p(np.exp(0.2))
    np.testing.assert_allclose(run(scores, batch, smoothing=0.1).value, want, rtol=1e-5)


def groups(key, outcome):
    shape = (*outcome.shape, 4)
    a, b, c = jax.random.split(key, 3)
    mask = jnp.arange(4) < jax.random.randint(c, (*outcome.shape, 1), 1, 5)
    logp = -jax.random.uniform(a, shape)
    return Scores(logp=logp), toy_batch(
        logp=jnp.zeros(shape), mask=mask, reference=logp + 0.3 * jax.random.normal(b, shape), outcome=outcome
    )


def test_groups_without_a_pair_count_nowhere():
    outcome = jnp.array([[0.2, 0.9, 0.5], [1.0, 1.0, 1.0], [0.0, 0.7, 0.1]])
    scores, batch = groups(jax.random.key(0), outcome)
    some = jnp.array([0, 2])
    got = run(scores, batch)
    only = run(Scores(logp=scores.logp[some]), jax.tree.map(lambda x: x[some] if jnp.ndim(x) else x, batch))
    np.testing.assert_allclose(got.value, only.value, rtol=1e-6)
    assert not got.coefficient[1].any()
    np.testing.assert_array_equal((got.coefficient != 0).any(-1)[0], [True, True, False])
    np.testing.assert_array_equal((got.coefficient != 0).any(-1)[2], [True, True, False])


def test_all_equal_is_zero_not_nan():
    scores, batch = groups(jax.random.key(1), jnp.ones((2, 3)))
    got = run(scores, batch)
    assert got.value == 0 and not got.coefficient.any()
    # Without the filter, too.
    loss = PreferenceLoss(objective=partial(logistic, beta=0.1))
    assert evaluate(loss, scores, batch).value == 0


def test_a_sum_over_prompts():
    scores, batch = groups(jax.random.key(2), jnp.array([[0.2, 0.9, 0.5], [1.0, 0.0, 1.0], [0.0, 0.7, 0.1]]))
    algorithm = load("dpo")
    batch = prepare(algorithm, batch)
    whole = evaluate(algorithm.loss, scores, batch)
    share = algorithm.loss.aggregate(batch.mask)
    np.testing.assert_allclose(share.sum(), 1, rtol=1e-6)
    parts = 0.0
    for i in range(3):
        part = jax.tree.map(lambda x: x[i : i + 1] if jnp.ndim(x) else x, batch)  # noqa: B023
        part = part.__class__(**{**vars(part), "share": share[i : i + 1]})
        parts += algorithm.loss(Scores(logp=scores.logp[i : i + 1]), part)[0]
    np.testing.assert_allclose(parts, whole.value, rtol=1e-6)
