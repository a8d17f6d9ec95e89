"""The sampled distribution: filters, likelihoods, the inverse CDF."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxrl_llm.rollouts.distribution import FAR, choose, draw, filtered, log_prob, uniform
from jaxrl_llm.types import Sampling


def reference(logits, temperature, top_k, top_p, min_p):
    """Support and distribution of one row, by sorting, in float64."""
    z = np.asarray(logits, np.float64) / (temperature or 1.0)
    keep = np.ones(z.shape, bool)
    if top_k is not None and top_k > 0:
        keep &= z >= np.sort(z)[::-1][min(top_k, len(z)) - 1]
    if top_p is not None and top_p < 1:
        p = special.softmax(np.where(keep, z, -np.inf))
        order = np.argsort(-p, kind="stable")
        last = order[np.searchsorted(np.cumsum(p[order]), top_p)]
        keep &= p >= p[last]
    if min_p is not None and min_p > 0:
        keep &= z >= z.max() + np.log(min_p)
    return keep, special.softmax(np.where(keep, z, -np.inf))


SETTINGS = list(itertools.product([0.7, 1.0, 1.3], [None, 0, -1, 1, 5, 1000], [None, 1.0, 0.8, 0.05], [None, 0.0, 0.1]))


@pytest.fixture(scope="module")
def logits():
    rows = jax.random.normal(jax.random.key(0), (6, 50)) * jnp.array([0.1, 1, 3, 10, 30, 1])[:, None]
    return rows.at[5].set(jnp.round(rows[5]))  # ties


def stacked(settings):
    """All settings as the rows of one program; None becomes the value that is off."""
    t, k, p, m = zip(*settings, strict=True)
    return Sampling(
        temperature=jnp.array(t, jnp.float32)[:, None],
        top_k=jnp.array([0 if x is None else x for x in k])[:, None],
        top_p=jnp.array([1.0 if x is None else x for x in p], jnp.float32)[:, None],
        min_p=jnp.array([0.0 if x is None else x for x in m], jnp.float32)[:, None],
    )


def test_filtered_is_temperature_then_top_k_then_top_p_then_min_p(logits):
    got = np.asarray(jax.jit(filtered)(jnp.broadcast_to(logits, (len(SETTINGS), *logits.shape)), stacked(SETTINGS)))
    for setting, rows in zip(SETTINGS, got, strict=True):
        for row, z in zip(rows, np.asarray(logits), strict=True):
            keep, p = reference(z, *setting)
            np.testing.assert_array_equal(row > FAR / 2, keep, err_msg=str(setting))
            np.testing.assert_allclose(special.softmax(row.astype(np.float64)), p, atol=1e-6)


def test_absent_filters_equal_filters_switched_off(logits):
    off = Sampling(temperature=jnp.array(0.7), top_k=jnp.array(-1), top_p=jnp.array(1.0), min_p=jnp.array(0.0))
    tokens = jnp.arange(6)
    for a, b in zip(log_prob(logits, tokens, Sampling(temperature=0.7)), log_prob(logits, tokens, off), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_may_have_their_own_settings(logits):
    each = Sampling(
        temperature=jnp.array([0.7, 1, 1.3, 1, 0, 1]),
        top_k=jnp.array([0, 3, 0, -1, 0, 2]),
        top_p=jnp.array([0.5, 1, 1, 0.9, 1, 0.9]),
    )
    got = filtered(logits, each)
    for i in range(6):
        alone = filtered(logits[i], jax.tree.map(lambda x, i=i: x[i], each))
        np.testing.assert_array_equal(got[i], alone)


def test_a_filter_that_is_off_is_not_executed():
    rows = jnp.zeros((4, 32))
    sampling = Sampling(temperature=jnp.ones(4), top_k=jnp.zeros(4, int), top_p=jnp.ones(4))
    program = str(jax.make_jaxpr(filtered)(rows, sampling))
    assert program.count("cond[") == 2 and "sort" not in program


def test_log_prob_and_entropy_of_every_setting(logits):
    tokens = jnp.argmax(logits, -1)
    logp, entropy = jax.jit(log_prob)(
        jnp.broadcast_to(logits, (len(SETTINGS), *logits.shape)),
        jnp.broadcast_to(tokens, (len(SETTINGS), 6)),
        stacked(SETTINGS),
    )
    for n, setting in enumerate(SETTINGS):
        for i in range(6):
            _, p = reference(np.asarray(logits[i]), *setting)
            np.testing.assert_allclose(logp[n, i], np.log(p[tokens[i]]), atol=2e-5)
            np.testing.assert_allclose(entropy[n, i], special.entr(p).sum(), atol=2e-5)


def test_a_given_token_is_always_in_the_support(logits):
    sampling = Sampling(temperature=1.0, top_k=3, top_p=0.5)
    worst = jnp.argmin(logits, -1)
    logp, entropy = log_prob(logits, worst, sampling)
    assert np.isfinite(logp).all() and np.isfinite(entropy).all()
    keep = np.array(filtered(logits, sampling) > FAR / 2)
    for i in range(6):
        keep[i, worst[i]] = True
        expected = np.where(keep[i], logits[i], -np.inf)
        np.testing.assert_allclose(logp[i], special.log_softmax(expected)[worst[i]], rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_gradient_is_that_of_the_distribution_on_its_support(temperature):
    logits = jax.random.normal(jax.random.key(1), (3, 20)) * 2
    logits = logits.at[:, 7].set(-jnp.inf)
    tokens = jnp.array([0, 1, 2])
    sampling = Sampling(temperature=temperature, top_k=6, top_p=0.9)
    keep = (filtered(logits, sampling) > FAR / 2) | (jnp.arange(20) == tokens[:, None])

    def total(logits):
        logp, entropy = log_prob(logits, tokens, sampling)
        return (logp + 0.3 * entropy).sum()

    def expected(logits):
        z = jnp.where(keep, jnp.where(keep, logits, 0.0) / (temperature or 1.0), -1e9)
        logp = jax.nn.log_softmax(z)
        entropy = -(jnp.exp(logp) * jnp.where(keep, logp, 0.0)).sum(-1)
        return (jnp.take_along_axis(logp, tokens[:, None], -1)[:, 0] + 0.3 * entropy).sum()

    got = jax.grad(total)(logits)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, jax.grad(expected)(logits), atol=1e-6)
    assert (np.asarray(got)[~np.asarray(keep)] == 0).all() and np.abs(got).max() > 0.1


def test_gradient_of_extreme_logits_is_finite():
    logits = jnp.array([[1e30, 0.0, -1e30, -jnp.inf], [0.0, 0.0, 0.0, 0.0]])
    for temperature in (1.0, 1e-3):
        sampling = Sampling(temperature=temperature, top_k=2, top_p=0.9, min_p=0.1)
        got = jax.grad(lambda z, s=sampling: sum(x.sum() for x in log_prob(z, jnp.array([0, 1]), s)))(logits)
        assert np.isfinite(got).all()


def test_choose_follows_the_distribution():
    logits = jax.random.normal(jax.random.key(2), (300,)) * 1.5  # three blocks, the last one not full
    for sampling in (Sampling(temperature=0.8), Sampling(temperature=1.2, top_k=40, top_p=0.9)):
        keys = jax.random.split(jax.random.key(3), 40_000)
        drawn = jax.jit(choose)(keys, jnp.broadcast_to(logits, (40_000, 300)), sampling)
        p = special.softmax(np.asarray(filtered(logits, sampling), np.float64))
        counts = np.bincount(np.asarray(drawn), minlength=300)
        assert counts[p == 0].sum() == 0
        few = p * 40_000 < 5
        observed = np.append(counts[~few], counts[few].sum())
        expected = np.append(p[~few], p[few].sum()) * 40_000
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert stats.chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [3, 128, 129, 300])
@pytest.mark.parametrize("kept", [(0,), (-1,), (127, 128), (127,), (128,), (1, 2), (0, -1)])
def test_no_number_chooses_a_filtered_token(vocab, kept):
    kept = sorted({k % vocab for k in kept})
    logits = jnp.full(vocab, -jnp.inf).at[jnp.array(kept)].set(0.0)
    number = jnp.array([0.0, 2.0**-24, 0.5 - 2.0**-24, 0.5, 1 - 2.0**-24, 1.0])
    token, logp, _ = draw(number, jnp.broadcast_to(logits, (6, vocab)), Sampling(temperature=1.0))
    assert set(np.asarray(token)) == set(kept)
    np.testing.assert_allclose(logp, -np.log(len(kept)), rtol=1e-6)


def test_rounding_never_chooses_a_filtered_token():
    rows = jax.random.normal(jax.random.key(4), (500, 700)) * 4
    rows = jnp.where(jax.random.bernoulli(jax.random.key(5), 0.7, rows.shape), -jnp.inf, rows)
    for number in (0.0, 1 - 2.0**-24, 1.0):
        token, _, _ = draw(jnp.full(500, number), rows, Sampling(temperature=1.0))
        assert (jnp.take_along_axis(rows, token[:, None], -1) > -jnp.inf).all()


def test_temperature_zero_is_the_first_most_probable_token(logits):
    greedy = Sampling(temperature=jnp.array(0.0), top_k=jnp.array(-1))
    keys = jax.random.split(jax.random.key(6), 6)
    np.testing.assert_array_equal(choose(keys, logits, greedy), jnp.argmax(logits, -1))
    _, logp, entropy = draw(uniform(keys), logits, greedy)
    p = special.softmax(np.asarray(logits, np.float64), axis=-1)
    np.testing.assert_allclose(logp, np.log(p.max(-1)), atol=2e-6)
    np.testing.assert_allclose(entropy, special.entr(p).sum(-1), atol=2e-5)


def test_draw_reports_what_log_prob_says(logits):
    sampling = Sampling(temperature=jnp.array(1.3), top_k=jnp.array(7), top_p=jnp.array(0.8), min_p=jnp.array(0.05))
    token, logp, entropy = draw(uniform(jax.random.split(jax.random.key(7), 6)), logits, sampling)
    again = log_prob(logits, token, sampling)
    np.testing.assert_array_equal(logp, again[0])
    np.testing.assert_array_equal(entropy, again[1])


def test_uniform_is_one_number_a_key():
    numbers = np.asarray(uniform(jax.random.split(jax.random.key(8), (40, 50)))).ravel()
    assert len(set(numbers)) > 1990 and (numbers >= 0).all() and (numbers < 1).all()
    assert stats.kstest(numbers, "uniform").pvalue > 1e-3


def test_vmap_over_settings_equals_one_at_a_time(logits):
    sampling = Sampling(temperature=jnp.array([0.7, 1.0]), top_p=jnp.array([0.8, 1.0]), top_k=jnp.array([0, 4]))
    got = jax.vmap(filtered, in_axes=(None, 0))(logits, sampling)
    for i in range(2):
        np.testing.assert_array_equal(got[i], filtered(logits, jax.tree.map(lambda x, i=i: x[i], sampling)))
