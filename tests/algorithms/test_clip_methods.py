"""Methods that change how far a token may move: soft gates, clips of means, prefixes, searched bounds and targets."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.apo import difficulty_weight, overlong_weight
from jaxrl_llm.algorithms.asymre import shifted_center
from jaxrl_llm.algorithms.bapo import balance, in_gradient, in_loss
from jaxrl_llm.algorithms.bpo_gbpo import best_move, median
from jaxrl_llm.algorithms.clip_cov import stopped_at_random
from jaxrl_llm.algorithms.hapo_het import entropy_level, heterogeneous, token_center_scale
from jaxrl_llm.algorithms.kl_cov import most_covariant
from jaxrl_llm.algorithms.lite_ppo import group_mean_batch_std
from jaxrl_llm.algorithms.minpro import prefix_ratio
from jaxrl_llm.algorithms.opmd import minus_log_mean_exp
from jaxrl_llm.algorithms.rec import balanced
from jaxrl_llm.algorithms.sapo import soft_gate
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.covariance import covariance
from jaxrl_llm.losses.gated import clipped_importance, exponential, importance, one_sided, open_gate, ring, two_sided
from jaxrl_llm.losses.ratio import sequence_ratio
from jaxrl_llm.losses.surrogates import clip_min, dual_clip, unclipped
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_rows
from jaxrl_llm.types import Scores

FILLS = pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])


def change(name, *, kwargs=None, loss=None, **slots):
    """A method with other arguments, slots, and fields of its loss."""
    parent = load(name, **({"kl": None} if name == "grpo" else {}), **(kwargs or {}))
    return dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, **(loss or {})), **slots)


def at(algorithm, scores, batch):
    return evaluate(algorithm.loss, scores, prepare(algorithm, batch))


def assert_equal(child, parent, scores, batch, *, value=True):
    """In value and gradient, neither of them 0."""
    a, b = at(child, scores, batch), at(parent, scores, batch)
    if value:
        np.testing.assert_allclose(a.value, b.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a.coefficient, b.coefficient, rtol=2e-4, atol=1e-5)
    assert (jnp.abs(b.coefficient) > 1e-3).any()


def on_policy(batch):
    return Scores(logp=batch.rollouts.logp)


def assert_toy(loss, value, coefficient, *, fill=jnp.nan, **fields):
    """On `toy_rows`: the loss, and `N * d loss / d logp` of its five tokens."""
    got = evaluate(loss, *toy_rows(fill=fill, **fields))
    np.testing.assert_allclose(got.value, value, atol=2e-6)
    np.testing.assert_allclose(got.coefficient[0].ravel()[:5], coefficient, atol=2e-6)
    assert got.coefficient[0, 1, 2] == 0


# --- sapo -------------------------------------------------------------------------------------------------------------


@FILLS
def test_sapo_numbers(fill):
    loss = change("sapo", loss={"aggregate": token_mean}).loss
    assert_toy(loss, -0.595992, [-1.206556, -0.902792, -1.486739, 0.727269, 1.205048], fill=fill)
    by_row = evaluate(load("sapo").loss, *toy_rows(fill=fill))
    np.testing.assert_allclose(by_row.value, -0.182298, atol=1e-6)


def test_sapo_gate_has_slope_1_at_the_old_policy_and_fades():
    ratio = jnp.array([0.01, 0.5, 1.0, 2.0, 4.0, 8.0])
    for advantage, tau in ((2.0, 1.0), (-2.0, 1.05)):
        slope = jax.vmap(jax.grad(soft_gate), (0, None, None))(ratio, jnp.array(advantage), jnp.array(0.0))
        gate = 1 / (1 + np.exp(-tau * (np.asarray(ratio) - 1)))
        np.testing.assert_allclose(slope, -advantage * 4 * gate * (1 - gate), rtol=1e-5)
        np.testing.assert_allclose(slope[2], -advantage, rtol=1e-6)
        assert (jnp.abs(slope) <= 2).all() and (jnp.diff(jnp.abs(slope[2:])) < 0).all()
    # Sharper where the advantage is negative.
    one = jax.grad(soft_gate)(2.0, jnp.array(1.0), 0.0), jax.grad(soft_gate)(2.0, jnp.array(-1.0), 0.0)
    assert abs(one[1]) < abs(one[0])


def test_sapo_on_policy_is_reinforce_and_without_temperature_unclipped():
    scores, batch = random_batch(jax.random.key(7))
    child = load("sapo")
    reinforce = change("reinforce", advantage=child.advantage, loss={"aggregate": sequence_mean_token_mean})
    assert_equal(child, reinforce, on_policy(batch), batch, value=False)
    parent = change("grpo", loss={"surrogate": unclipped})
    assert_equal(load("sapo", positive=1e-3, negative=1e-3), parent, scores, batch, value=False)


# --- gmpo -------------------------------------------------------------------------------------------------------------


def gmpo_of_the_paper(new, old, mask, advantage, epsilon):
    """Algorithm 1 of 2507.20673, for one row, in numpy."""
    sign = 1 if advantage > 0 else -1
    difference = sign * (new - old)
    least = sign * np.minimum(difference, np.clip(difference, -epsilon, epsilon))
    return -advantage * np.exp(least[mask].sum() / mask.sum())


@FILLS
def test_gmpo_is_the_papers_algorithm(fill):
    scores, batch = toy_rows(fill=fill)
    new, old, mask = (np.asarray(x[0]) for x in (scores.logp, batch.rollouts.logp, batch.mask))
    want = np.mean([gmpo_of_the_paper(new[i], old[i], mask[i], sign, 0.4) for i, sign in enumerate((1.0, -1.0))])
    np.testing.assert_allclose(want, -0.115065, atol=1e-6)
    # The means of the clipped log-ratios are 0.5 / 3 and -0.1 / 2; the clipped token has no gradient.
    s = np.exp([0.5 / 3, -0.05])
    per_row = 5 / 2
    coefficient = [-s[0] * per_row / 3, -s[0] * per_row / 3, 0, s[1] * per_row / 2, s[1] * per_row / 2]
    assert_toy(load("gmpo").loss, want, coefficient, fill=fill)


def test_gmpo_clips_only_where_the_advantage_pushes():
    """A row of two tokens with D = 1 and -1: up only the first is clipped, down only the second."""
    for sign, mean in ((1.0, (0.4 - 1) / 2), (-1.0, (1 - 0.4) / 2)):
        batch = toy_batch(logp=jnp.zeros((1, 1, 2)), advantage=jnp.array([[sign]]))
        got = evaluate(load("gmpo").loss, Scores(logp=jnp.array([[[1.0, -1.0]]])), batch)
        np.testing.assert_allclose(got.value, -sign * np.exp(mean), rtol=1e-6)
        want = [0, -np.exp(mean)] if sign > 0 else [np.exp(mean), 0]
        np.testing.assert_allclose(got.coefficient.ravel(), want, rtol=1e-6, atol=1e-7)


def test_gmpo_limits():
    scores, batch = random_batch(jax.random.key(6), length=1)
    bounds = partial(clip_min, low=1 - np.exp(-0.1), high=np.exp(0.1) - 1)
    assert_equal(load("gmpo", width=0.1), change("grpo", loss={"surrogate": bounds}), scores, batch)
    scores, batch = random_batch(jax.random.key(7))
    free = change("gspo", loss={"surrogate": unclipped})
    assert_equal(load("gmpo", width=100.0), free, scores, batch)


# --- minpro -----------------------------------------------------------------------------------------------------------


@FILLS
def test_minpro_numbers(fill):
    scores, batch = toy_rows(fill=fill)
    ratio = np.array([[1.221403, 0.904837, 1.648721], [0.740818, 1.221403, 1.0]])
    prefix = np.array([[1, 1.221403, 0.904837], [1, 0.740818, 0.740818]])
    np.testing.assert_allclose(prefix_ratio(scores, batch)[0], prefix * ratio, rtol=1e-5)
    assert_toy(load("minpro").loss, 0.522325, [-1.221403, -1.105171, -1.28, 0.8, 0.904837], fill=fill)


def test_minpro_takes_the_minimum_over_the_tokens_that_count():
    """A tool's token between two others has a tiny ratio, which must not damp what follows; a policy's does."""
    new = jnp.log(jnp.array([[[2.0, 1e-3, 3.0, 1.0], [2.0, 1e-3, 3.0, 1.0]]]))
    mask = jnp.array([[[1, 0, 1, 1], [1, 1, 1, 1]]])
    batch = toy_batch(logp=jnp.zeros((1, 2, 4)), mask=mask)
    want = [[2.0, 2.0, 6.0, 2.0], [2.0, 2e-3, 3e-3, 1e-3]]
    got = prefix_ratio(Scores(logp=new), batch)[0]
    np.testing.assert_allclose(got[mask[0] == 1], np.array(want)[mask[0] == 1], rtol=1e-5)


def test_minpro_limits():
    scores, batch = random_batch(jax.random.key(6), length=1)
    cispo = change("cispo", kwargs={"clip_low": 0.2, "clip_high": 0.28}, loss={"aggregate": token_mean})
    assert_equal(load("minpro"), cispo, scores, batch)
    _, batch = random_batch(jax.random.key(7))
    reinforce = change("reinforce", advantage=cispo.advantage, loss={"aggregate": token_mean})
    assert_equal(load("minpro"), reinforce, on_policy(batch), batch)


# --- kl_cov and clip_cov ----------------------------------------------------------------------------------------------

PLAIN = [-1.221403, -0.904837, -1.648721, 0.740818, 1.221403]  # the unclipped loss on `toy_rows`


@FILLS
def test_covariance(fill):
    got = covariance(*toy_rows(fill=fill))
    np.testing.assert_allclose(got[0].ravel(), [0.4, -0.24, -0.56, 0.24, -0.84, 0], atol=1e-6)


@FILLS
def test_kl_cov_numbers(fill):
    assert_toy(load("kl_cov", share=0.2).loss, -0.322548, [-0.221403, *PLAIN[1:]], fill=fill)
    # Two tokens: the second has D < 0, and is drawn up.
    two = [-0.221403, *PLAIN[1:3], PLAIN[3] - 1, PLAIN[4]]
    assert_toy(load("kl_cov", share=0.4).loss, -0.362548 + (0.2 + 0.3) / 5, two, fill=fill)
    assert_toy(load("kl_cov", share=0.4, weight=0.0).loss, -0.362548, PLAIN, fill=fill)


def test_kl_cov_holds_one_token_of_a_small_batch_and_none_without_covariance():
    scores, batch = toy_rows(fill=jnp.nan)
    held = most_covariant(scores, batch, share=2e-4)["held"]
    np.testing.assert_array_equal(held.ravel(), [True, *[False] * 5])
    nothing = toy_rows(advantage=jnp.ones((1, 2, 3)))  # no spread of the advantages
    assert not most_covariant(*nothing, share=1.0)["held"].any()


def test_kl_cov_limit():
    scores, batch = random_batch(jax.random.key(7))
    parent = change("dapo", reward=load("kl_cov").reward, loss={"surrogate": unclipped})
    assert_equal(load("kl_cov", weight=0.0), parent, scores, batch)


@FILLS
def test_clip_cov_stops_a_token_and_keeps_it_in_the_denominator(fill):
    loss = load("clip_cov", share=0.2, above=0.3).loss
    assert_toy(loss, -0.362548 + 1.221403 / 5, [0, *PLAIN[1:]], fill=fill)
    # Above the upper limit, or clipped already: not among those that may be stopped.
    assert_toy(load("clip_cov", share=0.2, above=0.3, below=0.35).loss, -0.362548, PLAIN, fill=fill)
    clipped = load("clip_cov", share=0.2, above=0.3, clip_low=0.2, clip_high=0.2).loss
    value = (-1.2 - 0.904837 - 1.2 + 0.8 + 1.221403) / 5
    assert_toy(clipped, value, [0, PLAIN[1], 0, 0, PLAIN[4]], fill=fill)
    # Not in a batch whose covariances are below 1, the default.
    assert_toy(load("clip_cov").loss, -0.362548, PLAIN, fill=fill)


def test_clip_cov_draws_lots():
    """Half of the tokens have a high covariance; a quarter of all is stopped, another quarter in another step."""
    key = jax.random.key(0)
    logp = jnp.concatenate([jnp.full((4, 2, 8), -0.1), jnp.full((4, 2, 8), -5.0)], -1)
    tokens = jax.random.randint(key, logp.shape, 0, 1000)
    batch = toy_batch(logp=logp, advantage=jnp.array([[1.0, -1.0]] * 4), tokens=tokens)
    bounds = {"above": 1.0, "below": 5.0, "low": 1.0, "high": 1.0}
    chosen = []
    for step in range(3):
        batch = dataclasses.replace(batch, step=jnp.array(step))
        chosen.append(np.asarray(stopped_at_random(on_policy(batch), batch, share=0.25, **bounds)["stopped"]))
    # Covariances are +-2.45: positive ones are where a good row is certain, or a bad one is not.
    eligible = np.zeros(logp.shape, bool)
    eligible[:, 0, :8] = eligible[:, 1, 8:] = True
    assert all(c.sum() == 32 and not (c & ~eligible).any() for c in chosen)
    assert (chosen[0] != chosen[1]).any() and (chosen[1] != chosen[2]).any()
    assert all(8 <= (a & b).sum() <= 24 for a, b in [chosen[:2], chosen[1:]])
    again = stopped_at_random(on_policy(batch), batch, share=0.25, **bounds)["stopped"]
    np.testing.assert_array_equal(again, chosen[2])


def test_clip_cov_limit():
    scores, batch = random_batch(jax.random.key(7))
    child = load("clip_cov", above=float("inf"), clip_low=0.2, clip_high=0.28)
    assert_equal(child, change("dapo", reward=child.reward), scores, batch)


# --- lite_ppo ---------------------------------------------------------------------------------------------------------


def test_lite_ppo_has_one_scale_for_the_batch():
    outcome = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    keep = jnp.array([[True] * 4, [True] * 4, [False] * 4])  # the third group is in no statistic
    batch = toy_batch(logp=jnp.zeros((3, 4, 1)), outcome=outcome.at[2].set(jnp.nan), keep=keep)
    got = group_mean_batch_std(batch)[..., 0]
    np.testing.assert_allclose(got[0], [1.403122, *[-0.467707] * 3], atol=1e-5)
    np.testing.assert_allclose(got[1], [*[0.467707] * 3, -1.403122], atol=1e-5)
    np.testing.assert_array_equal(got[2], 0)
    np.testing.assert_allclose(got.sum(-1), 0, atol=1e-5)
    whole = toy_batch(logp=jnp.zeros((3, 4, 1)), outcome=outcome)
    std = np.std(np.asarray(outcome), ddof=1)
    np.testing.assert_allclose(
        group_mean_batch_std(whole)[0, :, 0], np.array([0.75, -0.25, -0.25, -0.25]) / std, atol=1e-5
    )
    equal = toy_batch(logp=jnp.zeros((3, 4, 1)), outcome=jnp.full((3, 4), 0.1))
    np.testing.assert_array_equal(group_mean_batch_std(equal), 0)


def test_lite_ppo_with_one_group_is_grpo():
    scores, batch = random_batch(jax.random.key(5), prompts=1)
    assert_equal(load("lite_ppo"), change("grpo", loss={"aggregate": token_mean}), scores, batch)


# --- bapo -------------------------------------------------------------------------------------------------------------

# Seven tokens and their ratios; three are good.
EXAMPLE_A = jnp.array([1.0, 1, 1, -1, -1, -1, -1])
EXAMPLE_R = jnp.array([1.47, 0.9, 1.1, 1, 0.72, 1.3, 0.5])
GRID = {"low": 0.6, "low_end": 0.8, "high": 1.2, "high_end": 2.0}


def bounds(ratio=EXAMPLE_R, advantage=EXAMPLE_A, **kwargs):
    """The lower and the upper bound that bapo finds for tokens of one row each."""
    batch = toy_batch(logp=jnp.zeros((1, ratio.size, 1)), advantage=advantage[None])
    widths = load("bapo", **(GRID | kwargs)).loss.prepare(Scores(logp=jnp.log(ratio)[None, :, None]), batch)
    return [1 - widths["low"], 1 + widths["high"]]


def test_bapo_balance():
    for low, high, want in ((0.6, 1.2, 0.883978), (0.8, 1.2, 0.820513), (0.8, 1.5, 0.889744), (0.8, 2.0, 0.889744)):
        np.testing.assert_allclose(balance(in_loss(EXAMPLE_R, EXAMPLE_A, low, high)), want, atol=1e-6)
    for low, high, want in ((0.6, 1.2, 0.662252), (0.75, 1.2, 0.869565), (0.8, 1.5, 1.508696)):
        np.testing.assert_allclose(balance(in_gradient(EXAMPLE_R, EXAMPLE_A, low, high)), want, atol=1e-6)
    # On-policy it is the sum of the advantages, whatever the bounds; infinite without bad tokens.
    on = balance(in_loss(jnp.ones(7), EXAMPLE_A, 0.9, 1.1))
    np.testing.assert_allclose(on, 3 / 4, rtol=1e-6)
    assert balance(in_loss(jnp.ones(3), jnp.ones(3), 0.9, 1.1)) == jnp.inf


def test_bapo_search():
    np.testing.assert_allclose(bounds(), [0.8, 2.0], atol=1e-5)
    np.testing.assert_allclose(bounds(target=0.8), [0.6, 1.2], atol=1e-6)  # balanced at the start
    np.testing.assert_allclose(bounds(measure=in_gradient, target=0.8), [0.75, 1.2], atol=1e-5)
    np.testing.assert_allclose(bounds(measure=in_gradient), [0.8, 1.5], atol=1e-5)
    # Steps that do not divide the range end at it; a step of 0 ends the search.
    np.testing.assert_allclose(bounds(low_step=0.15, high_step=0.35), [0.8, 2.0], atol=1e-6)
    np.testing.assert_allclose(bounds(low_step=0.0), [0.6, 2.0], atol=1e-5)
    np.testing.assert_allclose(bounds(advantage=jnp.ones(7)), [0.6, 1.2], atol=1e-6)


def test_bapo_clips_at_what_it_found():
    """At (0.8, 2.0): of the seven only the bad ratios below 0.8 are clipped."""
    batch = toy_batch(logp=jnp.zeros((1, 7, 1)), advantage=EXAMPLE_A[None])
    got = evaluate(load("bapo", **GRID).loss, Scores(logp=jnp.log(EXAMPLE_R)[None, :, None]), batch)
    np.testing.assert_allclose(got.coefficient.ravel(), [-1.47, -0.9, -1.1, 1, 0, 1.3, 0], atol=1e-5)
    np.testing.assert_allclose(got.value, (-1.47 - 0.9 - 1.1 + 1 + 0.8 + 1.3 + 0.8) / 7, atol=1e-6)


@FILLS
def test_bapo_limit(fill):
    scores, batch = random_batch(jax.random.key(7), fill=fill)
    fixed = {"low_end": 0.9, "low": 0.9, "high": 1.1, "high_end": 1.1, "bound": 1.15}
    clip = partial(dual_clip, low=0.1, high=0.1, bound=1.15)
    parent = change("grpo", loss={"surrogate": clip, "aggregate": token_mean})
    assert_equal(load("bapo", **fixed), parent, scores, batch)


# --- rec, opmd, asymre ------------------------------------------------------------------------------------------------


@FILLS
def test_rec_numbers(fill):
    for kwargs, coefficient in (
        ({"gate": one_sided, "weight": importance}, [0, -0.904837, 0, 0, 1.221403]),
        ({"gate": two_sided, "weight": importance}, [0, -0.904837, 0, 0, 0]),
        ({"gate": open_gate, "weight": importance}, PLAIN),
        (
            {"gate": open_gate, "weight": partial(clipped_importance, low=0.2, high=0.5)},
            [*PLAIN[:2], -1.5, 0.8, PLAIN[4]],
        ),
        ({"gate": open_gate, "weight": exponential}, [-np.e, -np.e, -np.e, 1 / np.e, 1 / np.e]),
        ({"k2": 0.5}, [0.2, -1 - 0.1, 0.5, -0.3, 1 + 0.2]),  # the regulariser reaches tokens that the gate stops
        ({"forward_kl": 0.5}, [-0.5, -1.5, -0.5, -0.5, 0.5]),
    ):
        got = evaluate(load("rec", **kwargs).loss, *toy_rows(fill=fill))
        np.testing.assert_allclose(got.coefficient[0].ravel(), [*coefficient, 0], atol=2e-6, err_msg=str(kwargs))
    assert_toy(load("rec").loss, 0.2, [0, -1, 0, 0, 1], fill=fill)


def test_rec_ring():
    ratio = jnp.array([0.35, 3.5, 1.0, 0.5, 2.5, 1.3, 0.7])
    advantage = jnp.array([1.0, -1, 1, 1, -1, 1, -1])
    np.testing.assert_array_equal(ring(ratio, advantage), [True, True, True, False, False, False, False])


def test_rec_takes_a_sequence_ratio():
    """exp(0.2) of the first row is above 1.2, so it is stopped whole; the second row's is exp(-0.05)."""
    kwargs = {"ratio": sequence_ratio, "weight": importance, "aggregate": sequence_mean_token_mean}
    got = evaluate(load("rec", **kwargs).loss, *toy_rows())
    np.testing.assert_allclose(got.coefficient[0], [[0, 0, 0], [1.189037, 1.189037, 0]], atol=1e-6)


def test_rec_balance_leaves_out_bad_rows_until_there_are_no_more_than_good_ones():
    reward, keep = jnp.array([1.0, 0, 0, 0, jnp.nan]), jnp.array([True, True, True, True, False])
    chosen = np.array([balanced(key, reward, keep) for key in jax.random.split(jax.random.key(0), 12)])
    assert chosen[:, 0].all() and not chosen[:, 4].any() and (chosen.sum(-1) == 2).all()
    assert chosen[:, 1:4].any(0).all()  # by lot
    more_good = jnp.array([1.0, 1, 0, 1, 0])
    np.testing.assert_array_equal(balanced(jax.random.key(0), more_good, ~keep | keep), True)


def test_rec_balanced_rows_are_centred_again_and_the_others_stay_in_the_denominator():
    batch = toy_batch(logp=jnp.zeros((1, 4, 2)), outcome=jnp.array([[1.0, 0, 0, 0]]))
    prepared = prepare(load("rec", balance=True), batch)
    np.testing.assert_allclose(np.sort(prepared.advantage[0, :, 0]), [-0.5, 0, 0, 0.5])
    assert prepared.mask.all()


def test_rec_limits():
    scores, batch = random_batch(jax.random.key(7))
    reinforce = change("reinforce", advantage=partial(per_group, center), loss={"aggregate": token_mean})
    assert_equal(load("rec", gate=open_gate), reinforce, scores, batch)
    ppo = change("grpo", advantage=partial(per_group, center), loss={"aggregate": token_mean})
    assert_equal(load("rec", weight=importance), ppo, scores, batch, value=False)


def test_opmd():
    assert_toy(load("opmd").loss, 0.18, [-0.5, -0.5, -0.5, 0.5, 0.5])
    assert_toy(load("opmd", temperature=3.0).loss, 0.09, [-0.25, -0.25, -0.25, 0.25, 0.25])
    reward, keep = jnp.array([1.0, 0, 0, 0, jnp.nan]), jnp.array([True, True, True, True, False])
    got = minus_log_mean_exp(reward, keep, temperature=1.0)
    np.testing.assert_allclose(got, [1 - 0.357374, *[-0.357374] * 3, 0], atol=1e-6)
    # A high temperature gives the mean, a low one the best reward; neither overflows.
    np.testing.assert_allclose(minus_log_mean_exp(reward, keep, temperature=1e3), [0.75, *[-0.25] * 3, 0], atol=1e-3)
    np.testing.assert_allclose(
        minus_log_mean_exp(reward * 1e4, keep, temperature=1.0)[:2], [1.386294, -9998.6137], rtol=1e-6
    )
    for equal in (jnp.full(5, 0.1), jnp.full(5, 1e6)):
        np.testing.assert_array_equal(minus_log_mean_exp(equal, keep, temperature=1.0), 0)
    np.testing.assert_array_equal(minus_log_mean_exp(reward, jnp.zeros(5, bool), temperature=1.0), 0)


def test_opmd_limit():
    scores, batch = random_batch(jax.random.key(7))
    parent = change("reinforce", advantage=partial(per_group, center), loss={"aggregate": token_mean})
    assert_equal(load("opmd", temperature=1e-8), parent, scores, batch)
    hot = change("reinforce", advantage=partial(per_group, partial(minus_log_mean_exp, temperature=1.0)))
    halved = change("opmd", kwargs={"credit": minus_log_mean_exp}, loss={"aggregate": hot.loss.aggregate})
    np.testing.assert_allclose(2 * at(halved, scores, batch).value, at(hot, scores, batch).value, rtol=1e-5)


def test_asymre():
    keep = jnp.array([True, True, True, True, False])
    got = shifted_center(jnp.array([1.0, 0, 0, 0, jnp.nan]), keep)
    np.testing.assert_allclose(got, [0.85, -0.15, -0.15, -0.15, 0], atol=1e-6)
    np.testing.assert_array_equal(shifted_center(jnp.ones(1), jnp.ones(1, bool)), 0)
    # A group of equal rewards still learns: the shift is what it has.
    np.testing.assert_allclose(shifted_center(jnp.ones(5), keep), [0.1, 0.1, 0.1, 0.1, 0], atol=1e-6)
    scores, batch = random_batch(jax.random.key(7))
    parent = change("reinforce", advantage=partial(per_group, center), loss={"aggregate": token_mean})
    assert_equal(load("asymre", shift=0.0), parent, scores, batch)


# --- bpo_gbpo ---------------------------------------------------------------------------------------------------------


def test_gbpo_median():
    x = jnp.array([3.0, 1.0, jnp.nan, 2.0, 10.0])
    keep = jnp.array([True, True, False, True, True])
    np.testing.assert_allclose(median(x, keep), 2.5)
    np.testing.assert_allclose(median(x, keep.at[4].set(False)), 2.0)
    np.testing.assert_allclose(median(x, jnp.zeros(5, bool).at[0].set(True)), 3.0)
    np.testing.assert_array_equal(median(x, jnp.zeros(5, bool)), 0)


def test_gbpo_target():
    """Standard deviation 0.5, median 0: the good row is at 2, and 4 is its temperature for 0.5; the others at 0."""
    batch = toy_batch(logp=jnp.zeros((1, 4, 1)), outcome=jnp.array([[1.0, 0, 0, 0]]))
    widths = {"low": 0.2, "high": 0.2}
    got = best_move(Scores(), batch, **widths, temperature=4.0)["move"]
    np.testing.assert_allclose(got.ravel(), [0.048984, 0, 0, 0], atol=1e-5)
    hard = best_move(Scores(), batch, low=0.2, high=0.3, temperature=1e-4)["move"]
    np.testing.assert_allclose(hard.ravel(), [0.3, *[0.05] * 3], atol=1e-5)
    alone = toy_batch(logp=jnp.zeros((1, 1, 1)), outcome=jnp.ones((1, 1)))
    np.testing.assert_array_equal(best_move(Scores(), alone, **widths, temperature=1.0)["move"], 0)


@FILLS
def test_gbpo_pulls_back(fill):
    loss = load("bpo_gbpo", kl=None).loss
    old = toy_rows(fill=fill)[1].rollouts.logp
    assert_toy(loss, 0.249174, [1.221403, -0.904837, 1.648721, -0.740818, 1.221403], fill=fill, old=old)


def test_gbpo_anchors_rows_at_the_median():
    """[1, 0, 0, 0]: the zeros have the target 1 and weigh 0.5: what moved is drawn back, what rounding moved is not."""
    zeros = jnp.zeros((1, 4, 1))
    batch = toy_batch(logp=zeros, old=zeros, outcome=jnp.array([[1.0, 0, 0, 0]]))
    for near in (1.0, 1 + 1e-6, 1 - 1e-6):
        scores = Scores(logp=jnp.log(jnp.array([1.1, near, 1.1, 0.9]))[None, :, None])
        got = at(load("bpo_gbpo", kl=None), scores, batch)
        np.testing.assert_allclose(got.coefficient.ravel(), [-1.5 * 1.1, 0, 0.5 * 1.1, -0.5 * 0.9], atol=1e-4)


def test_gbpo_limit():
    """Groups that are half right, and ratios within the bounds."""
    _, batch = random_batch(jax.random.key(7), size=4)
    logp, mask = batch.rollouts.logp, batch.rollouts.mask.at[..., 0].set(True)
    batch = toy_batch(logp=logp, old=logp, mask=mask, outcome=jnp.array([[1.0, 0, 1, 0]] * 3))
    scores = Scores(logp=logp + 0.1 * jnp.sin(jnp.arange(60.0)).reshape(3, 4, 5))
    parent = change("grpo", loss={"aggregate": token_mean})
    assert_equal(load("bpo_gbpo", kl=None), parent, scores, batch, value=False)


# --- apo --------------------------------------------------------------------------------------------------------------


def test_apo_difficulty():
    """Of eight rows some correct; a ninth does not count."""
    keep = jnp.arange(9) < 8
    for right, want in ((0, 1), (1, 0.288077), (2, 0.493165), (4, 0.743119), (7, 0.907310), (8, 1)):
        correct = (jnp.arange(9) < right) | ~keep
        np.testing.assert_allclose(difficulty_weight(correct, keep), want, atol=1e-6)
    np.testing.assert_array_equal(difficulty_weight(keep, jnp.zeros(9, bool)), 1)


def test_apo_length():
    """Correct rows of 1 and 3 tokens: 2 on average. Only wrong rows that are longer weigh more."""
    length = np.array([[1, 3, 2, 4, 12, 9]] * 2)
    mask = np.arange(12) < length[..., None]
    outcome = jnp.array([[1.0, 1, 0, 0, 0, jnp.nan], [0.0] * 6])
    batch = toy_batch(logp=jnp.zeros(mask.shape), mask=mask, outcome=outcome, keep=np.isfinite(outcome))
    got = overlong_weight(batch, rate=0.5)
    np.testing.assert_allclose(got[0], [1, 1, 1, 2 - 1.5**-2, 2 - 1.5**-10, 1], rtol=1e-6)
    np.testing.assert_array_equal(got[1], 1)  # nobody is right
    for excess, want in ((100, 1.001), (1000, 1.00995), (10000, 1.095162)):
        mask = np.arange(excess + 1) < np.array([[[1], [excess + 1]]])
        batch = toy_batch(logp=np.zeros(mask.shape, np.float32), mask=mask, outcome=jnp.array([[1.0, 0.0]]))
        np.testing.assert_allclose(overlong_weight(batch, rate=1e-5), [[1, want]], atol=1e-6)


@FILLS
def test_apo_has_two_denominators(fill):
    """The surrogate is a mean over tokens, the divergence a mean over rows of their means."""
    scores, batch = toy_rows(fill=fill)
    batch = prepare(load("apo"), batch)
    got = evaluate(load("apo", kl=0.1, clip=10.0).loss, scores, batch)
    a, ratio = np.sqrt(0.5), np.exp([0.2, -0.1, 0.5, -0.3, 0.2])
    d = np.array([0.3, -0.2, 0.3, -0.2, 0.3])  # from the reference
    k3 = np.exp(-d) + d - 1
    # One of two is right: its divergence counts 1 - exp(-e / 2), the wrong row's in full.
    divergence = ((1 - np.exp(-np.e / 2)) * k3[:3].mean() + k3[3:].mean()) / 2
    np.testing.assert_allclose(got.value, -a * (ratio[:3].sum() - ratio[3:].sum()) / 5 + 0.1 * divergence, rtol=1e-5)
    slope = 0.1 * (1 - np.exp(-d)) * np.array([*[(1 - np.exp(-np.e / 2)) / 6] * 3, 1 / 4, 1 / 4]) * 5
    want = -a * np.array([1, 1, 1, -1, -1]) * ratio + slope
    np.testing.assert_allclose(got.coefficient[0].ravel()[:5], want, rtol=1e-5)


def test_apo_limit():
    scores, batch = random_batch(jax.random.key(7))
    parent = change("grpo", loss={"aggregate": token_mean})
    assert_equal(load("apo", kl=None, rate=0.0), parent, scores, batch)


# --- hapo_het ---------------------------------------------------------------------------------------------------------

ENTROPY = jnp.array([0.05, 0.1, 0.2, 0.4, 0.8, 1.6])


def test_hapo_level_of_the_entropy():
    mask = jnp.array([[[True] * 3 + [False], [True] * 3 + [False]]])
    entropy = jnp.full((1, 2, 4), jnp.nan).at[..., :3].set(ENTROPY.reshape(2, 3))
    batch = toy_batch(logp=jnp.zeros((1, 2, 4)), mask=mask)
    got = entropy_level(Scores(entropy=entropy), batch, pivot=0.8)["level"]
    np.testing.assert_allclose(got[mask], [-1, -0.75, -0.5, -0.25, 0, 1], atol=1e-6)
    np.testing.assert_array_equal(got[~mask], 0)
    for same in (0.0, 0.3):
        np.testing.assert_array_equal(
            entropy_level(Scores(entropy=jnp.full((1, 2, 4), same)), batch, pivot=0.8)["level"], 0
        )


def hapo_token(level, ratio, advantage=1.0, **kwargs):
    arguments = {"low": 0.2, "high": 0.2, "widen": 1.0, "shift": 1.0, "bound": 10.0} | kwargs
    return jax.value_and_grad(heterogeneous)(ratio, advantage, 0.0, level=jnp.array(level), **arguments)


@pytest.mark.parametrize(
    "level, ratio, widen, advantage",
    [
        (0.5, 1.05, 1.0, 1),
        (0.5, 1.25, 1.0, 1.5),
        (-0.5, 1.05, 1.0, 0.5),
        (-0.5, 1.15, 1.0, 1),
        (0.5, 1.12, 0.0, 1.5),
        (0.5, 1.12, 1.0, 1),
    ],
)
def test_hapo_redistributes(level, ratio, widen, advantage):
    value, slope = hapo_token(level, ratio, widen=widen)
    np.testing.assert_allclose([value, slope], [-advantage * ratio, -advantage], rtol=1e-6)


def test_hapo_widths():
    """Where the gradient ends: the upper bound of good tokens, the lower of bad ones."""
    upper, lower = [0.2] * 5 + [0.4], [0.4, 0.35, 0.3, 0.25, 0.2, 0.2]
    levels = [-1, -0.75, -0.5, -0.25, 0, 1]
    for level, high, low in zip(levels, upper, lower, strict=True):
        good = [hapo_token(level, 1 + high + d, shift=0.0)[1] for d in (-0.01, 0.01)]
        bad = [hapo_token(level, 1 - low - d, -1.0, shift=0.0)[1] for d in (-0.01, 0.01)]
        np.testing.assert_array_equal([good, bad], [[-1, 0], [1, 0]])
    assert hapo_token(0.0, 9.9, -1.0)[1] == 1 and hapo_token(0.0, 10.1, -1.0)[1] == 0  # the dual clip


def test_hapo_group_average_counts_tokens():
    got = token_center_scale(jnp.array([1.0, 0, jnp.nan]), jnp.array([1.0, 3, 0]), most=5.0)
    np.testing.assert_allclose(got, [1.732047, -0.577349, 0], atol=1e-5)
    # 5.48 is too much: both rows are as in grpo.
    far = token_center_scale(jnp.array([1.0, 0]), jnp.array([1.0, 30]), most=5.0)
    np.testing.assert_allclose(far, [0.707106, -0.707106], atol=1e-5)
    np.testing.assert_array_equal(token_center_scale(jnp.full(3, 0.1), jnp.array([1.0, 3, 7]), most=5.0), 0)


def test_hapo_limit():
    scores, batch = random_batch(jax.random.key(7))
    clip = partial(dual_clip, low=0.2, high=0.2, bound=1.5)
    parent = change("dapo", loss={"surrogate": clip})
    assert_equal(load("hapo_het", widen=0.0, shift=0.0, most=0.0, bound=1.5), parent, scores, batch)
