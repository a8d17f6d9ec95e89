"""Corrections for a sampler that differs from the trainer."""

import dataclasses
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithm import PolicyLoss
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.testing import evaluate, toy_rows
from jaxrl_llm.types import INJECTED, POLICY
from jaxrl_llm.weights import importance as imp
from jaxrl_llm.weights.basic import ones

SAMPLER = jnp.array([[[-0.55, -1.05, -1.7], [-0.7, -0.35, jnp.nan]]])
LOSS = PolicyLoss(surrogate=partial(clip_min, low=0.2, high=0.2), ratio=partial(token_ratio, old=recomputed))


def rows(**kwargs):
    scores, batch = toy_rows()
    return scores, toy_rows(logp=SAMPLER, old=batch.rollouts.logp, fill=jnp.nan, **kwargs)[1]


@pytest.mark.parametrize(
    ("level", "want"),
    [
        (imp.per_token, [[1.051271, 1.051271, 0.740818], [1.0, 1.051271]]),
        (imp.per_sequence, [[0.818731] * 3, [1.051271] * 2]),
        (imp.per_sequence_geometric, [[0.935507] * 3, [1.025315] * 2]),
    ],
)
def test_ratios_by_hand(level, want):
    got = imp.truncated_importance(rows()[1], bound=jnp.inf, level=level)[0]
    np.testing.assert_allclose(got[0], want[0], atol=1e-6)
    np.testing.assert_allclose(got[1, :2], want[1], atol=1e-6)


def test_truncated_by_hand():
    scores, batch = rows()
    batch = dataclasses.replace(batch, weight=imp.truncated_importance(batch, bound=1.05))
    got = evaluate(LOSS, scores, batch)
    np.testing.assert_allclose(got.value, -0.203318, atol=1e-6)
    np.testing.assert_allclose(got.coefficient[0], [[0, -0.950079, 0], [0, 1.282473, 0]], atol=1e-6)


def test_masked_by_hand():
    scores, batch = rows()
    batch = dataclasses.replace(batch, weight=imp.masked_importance(batch, low=0.8, high=1.2))
    np.testing.assert_allclose(evaluate(LOSS, scores, batch).value, -0.025746, atol=1e-6)


def test_asymmetric_bounds_are_on_the_ratio_itself():
    _, batch = rows()
    np.testing.assert_array_equal(
        imp.masked_importance(batch, low=0.7, high=1.01)[0] > 0, [[False, False, True], [True, False, True]]
    )


def test_no_mismatch_no_change():
    scores, batch = toy_rows()
    batch = toy_rows(old=batch.rollouts.logp)[1]
    plain = evaluate(LOSS, scores, batch)
    for weight in (imp.truncated_importance, imp.masked_importance, ones):
        for level in (imp.per_token, imp.per_sequence, imp.per_sequence_geometric):
            fn = weight if weight is ones else partial(weight, level=level)
            got = evaluate(LOSS, scores, dataclasses.replace(batch, weight=fn(batch)))
            np.testing.assert_array_equal(got.value, plain.value)
            np.testing.assert_array_equal(got.coefficient, plain.coefficient)


def test_injected_tokens_weigh_one():
    role = jnp.array([[[POLICY, INJECTED, POLICY], [INJECTED, INJECTED, 0]]])
    _, batch = rows(role=role)
    got = imp.truncated_importance(batch, bound=10.0, level=imp.per_token)[0]
    np.testing.assert_allclose(got[0], [1.051271, 1.0, 0.740818], atol=1e-6)
    np.testing.assert_allclose(got[1], 1.0)


def test_no_old_is_said():
    with pytest.raises(ValueError, match=r"batch\.old\.logp"):
        imp.truncated_importance(toy_rows()[1])
