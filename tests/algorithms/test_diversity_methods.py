"""Methods that look at what a group says: SEED-GRPO, DARLING, URPA and COPO; and other ways to draw and judge rows."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.fleet import one_step, spread
from jaxrl_llm.advantages.group import center, center_scale, per_group
from jaxrl_llm.algorithms import copo, darling, direct_apo, load, seed_grpo, urpa
from jaxrl_llm.losses.aggregate import sequence_mean_token_sum, token_mean
from jaxrl_llm.losses.behaviour import already_seen
from jaxrl_llm.losses.regression import RatioRegression
from jaxrl_llm.losses.success_rate import cross_entropy
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.rewards.meaning import answer, cluster_shares, clusters, connected, same_answer
from jaxrl_llm.rewards.numbers import last_numbers
from jaxrl_llm.rollouts.steps import begins_step, first_token, next_token, sample_steps
from jaxrl_llm.tasks.characters import EOS, IDS, ZERO, encode
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts, whole_step
from jaxrl_llm.types import PADDING, POLICY, Batch, Learn, Rollouts, Sampling, Scores, World
from jaxrl_llm.updates.behaviour import descended
from jaxrl_llm.updates.best import judged, no_best
from jaxrl_llm.updates.passes import one_pass

ALL = jnp.ones(4, bool)


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient


def saying(*groups, **fields):
    """Groups whose rows say a digit each."""
    tokens = jnp.array(groups, jnp.int32)[..., None]
    return toy_batch(logp=jnp.zeros(tokens.shape) - 1.0, tokens=tokens, **fields)


def assert_equal_runs(child, parent, scores, batch):
    for got, want in zip(run(child, scores, batch), run(parent, scores, batch), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


# --- what is said -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("marker", "want"),
    [((), [7, 5, 7, 5, 3, 4]), ((7, 5), [3, 4]), ((5,), [3, 4]), ((9,), []), ((4,), []), ((3, 4, 0), [])],
)
def test_an_answer_is_what_follows_the_last_marker(marker, want):
    tokens = jnp.array([7, 5, 9, 7, 5, 3, 4, 0])
    mask = jnp.array([1, 1, 0, 1, 1, 1, 1, 0], bool)  # a masked token is not part of the text
    np.testing.assert_array_equal(answer(tokens, mask, marker=marker), want + [-1] * (8 - len(want)))


def test_answers_are_compared_whole_and_without_marker_are_one_class():
    tokens = jnp.array([[1, 2, 3], [1, 2, 4], [1, 2, 9], [5, 6, 7], [8, 2, 4]])
    mask = jnp.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 1]], bool)
    whole = same_answer(tokens, mask)
    np.testing.assert_array_equal(whole, np.eye(5))
    last = same_answer(tokens, mask, marker=(2,))
    np.testing.assert_array_equal(connected(last, jnp.ones(5, bool)), [0, 1, 2, 2, 1])  # "" and no marker: one class


def test_equivalence_is_made_transitive_but_not_through_rows_that_do_not_count():
    chain = jnp.eye(6, k=1, dtype=bool)  # 0-1-2-3-4-5, said in one order only
    np.testing.assert_array_equal(connected(chain, jnp.ones(6, bool)), jnp.zeros(6))
    broken = connected(chain, jnp.ones(6, bool).at[2].set(False))
    np.testing.assert_array_equal(broken, [0, 0, 2, 3, 3, 3])


def test_cluster_shares_are_of_rows_that_count():
    shares = cluster_shares(jnp.array([0, 1, 0, 3]), jnp.array([1.0, 2.0, 1.0, jnp.nan]), ALL.at[3].set(False))
    np.testing.assert_allclose(shares, [0.5, 0.5, 0, 0])
    assert not cluster_shares(jnp.arange(4), jnp.ones(4), ~ALL).any()


def test_clusters_of_a_batch():
    batch = saying([4, 5, 4, 4], [1, 2, 3, 3], keep=jnp.array([[1, 1, 1, 0], [1, 1, 1, 1]], bool))
    np.testing.assert_array_equal(clusters(batch, same=same_answer), [[0, 1, 0, 3], [0, 1, 2, 2]])


# --- SEED-GRPO --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probs", "entropy", "x"),
    [
        ([1.0], 0.0, 0.0),
        ([0.5, 0.5], 0.693147, 0.5),
        ([0.75, 0.25], 0.836988, 0.603760),
        ([0.25] * 4, 1.386294, 1.0),
        ([0.99, 0.01], 2.307610, 1.0),
    ],
)
def test_seed_grpo_semantic_entropy_of_four(probs, entropy, x):
    """The first cluster has the rows that are left; the last is beyond log 4 and clamped."""
    k = len(probs)
    cluster = jnp.array(list(range(k)) + [0] * (4 - k))
    rows = 5 - k  # of the first cluster
    p = np.array([probs[0] / rows, *probs[1:], *[probs[0] / rows] * (rows - 1)])
    found = seed_grpo.mean_surprise(jnp.log(p) - 500.0, cluster, ALL)  # the scale cancels, and does not underflow
    np.testing.assert_allclose(found, entropy, atol=1e-5)
    np.testing.assert_allclose(min(found / np.log(4), 1.0), x, atol=1e-5)
    want = -sum(q * np.log(q) for q in probs)
    np.testing.assert_allclose(seed_grpo.weighted_entropy(jnp.log(p), cluster, ALL), want, atol=1e-5)
    want = -sum(n / 4 * np.log(n / 4) for n in [rows] + [1] * (k - 1))
    np.testing.assert_allclose(seed_grpo.count_entropy(jnp.log(p), cluster, ALL), want, atol=1e-5)


@pytest.mark.parametrize(
    ("factor", "want"),
    [
        (seed_grpo.linear, [1, 0.5, 0.396240, 0]),
        (seed_grpo.exponential, np.exp([0, -0.5, -0.603760, -1])),
        (seed_grpo.focal, np.array([1, 0.5, 0.396240, 0]) ** 2),
    ],
)
def test_seed_grpo_weights_prompts(factor, want):
    batch = saying([1, 1, 1, 1], [1, 2, 1, 2], [1, 2, 2, 2], [1, 2, 3, 4])
    batch = dataclasses.replace(batch, outcome=jnp.tile(jnp.array([1.0, 0, 1, 0]), (4, 1)))
    batch = prepare(load("seed_grpo", alpha=1.0, factor=factor), batch)
    np.testing.assert_allclose(batch.weight[..., 0], np.tile(np.array(want)[:, None], (1, 4)), atol=1e-5)
    np.testing.assert_allclose((batch.weight * batch.advantage).sum((1, 2)), 0, atol=1e-6)


def test_seed_grpo_uses_length_normalised_likelihoods_of_rows_that_count():
    """Mean log-probs -1, -1, -2: not sums; the fourth row is dropped."""
    logp = jnp.array([[[-1.0, -1.0], [-1.0, jnp.nan], [-2.0, -2.0], [-9.0, -9.0]]])
    mask = jnp.array([[[1, 1], [1, 0], [1, 1], [1, 1]]], bool)
    batch = toy_batch(logp=logp, mask=mask, keep=[[True, True, True, False]])
    p = np.exp([-1.0, -1.0, -2.0])
    want = 1 - np.clip(-np.log(p / p.sum()).mean() / np.log(3), 0, 1) * 0.5
    np.testing.assert_allclose(prepare(load("seed_grpo", alpha=0.5), batch).weight[0, 0], want, rtol=1e-5)


def test_seed_grpo_without_strength_is_dr_grpo_and_else_scales_the_gradient():
    scores, batch = random_batch(jax.random.key(0))
    assert_equal_runs(load("seed_grpo", alpha=0.0), load("dr_grpo"), scores, batch)
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, tokens=batch.rollouts.tokens * 0))
    # 0 tokens say the same if they are as many: the weights differ by prompt.
    weight = prepare(load("seed_grpo", alpha=1.0, estimator=seed_grpo.count_entropy), batch).weight
    got = run(load("seed_grpo", alpha=1.0, estimator=seed_grpo.count_entropy), scores, batch)[1]
    np.testing.assert_allclose(got, weight * run(load("dr_grpo"), scores, batch)[1], rtol=1e-5, atol=1e-7)
    assert 0 < float(weight.max()) < 1


# --- DARLING ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "quality", "factor", "advantage"),
    [
        ([1, 1, 2, 3], [1, 0, 1, 1], [2 / 3, 2 / 3, 1, 1], [0, -2 / 3, 1 / 3, 1 / 3]),
        ([1, 1, 1, 1], [1, 0, 0, 0], [0.1] * 4, [0.075, -0.025, -0.025, -0.025]),
        ([1, 2, 3, 4], [1, 0, 0, 0], [1] * 4, [0.75, -0.25, -0.25, -0.25]),
        ([1, 2, 3, 4], [0, 0, 0, 0], [1] * 4, [0] * 4),  # different, but all wrong
    ],
)
def test_darling_pays_quality_times_diversity(said, quality, factor, advantage):
    found = darling.distinctness(clusters(saying(said), same=same_answer)[0], ALL, floor=0.1)
    np.testing.assert_allclose(found, factor, atol=1e-6)
    batch = prepare(load("darling"), saying(said, outcome=[quality]))
    np.testing.assert_allclose(batch.reward[0], np.array(factor) * quality, atol=1e-6)
    np.testing.assert_allclose(batch.advantage[0, :, 0], advantage, atol=1e-6)


def test_darling_compares_with_rows_that_count():
    keep = ALL.at[3].set(False)
    found = darling.distinctness(jnp.array([0, 0, 2, 3]), keep, floor=0.1)
    np.testing.assert_allclose(found, [0.5, 0.5, 1.0, 0.0])
    alone = darling.distinctness(jnp.arange(4), jnp.zeros(4, bool).at[1].set(True), floor=0.1)
    np.testing.assert_allclose(alone, [0, 0.1, 0, 0])


def test_darling_of_different_responses_is_centred_grpo():
    scores, batch = random_batch(jax.random.key(1))
    parent = load("grpo", kl=0.001)
    parent = dataclasses.replace(
        parent, advantage=partial(per_group, center), loss=dataclasses.replace(parent.loss, aggregate=token_mean)
    )
    assert_equal_runs(load("darling"), parent, scores, batch)
    repeated = dataclasses.replace(batch.rollouts, tokens=jnp.zeros_like(batch.rollouts.tokens))
    other = run(load("darling"), scores, dataclasses.replace(batch, rollouts=repeated))
    assert not np.allclose(other[1], run(parent, scores, batch)[1])


# --- URPA -------------------------------------------------------------------------------------------------------------

STARTS_AND_ENDS = jnp.array([[2.0, 10], [3, 10], [4, 13]])


@pytest.mark.parametrize(("ddof", "spread", "confidence"), [(0, 2.230710, 0.800058), (1, 2.732051, 0.760937)])
def test_urpa_trusts_the_mean_as_far_as_rows_agree(ddof, spread, confidence):
    of = partial(urpa.consensus, STARTS_AND_ENDS, jnp.ones(3, bool), agreement=urpa.overlap, ddof=ddof)
    iou = np.array([7 / 9, 7 / 8, 0.7])
    np.testing.assert_allclose(of(gamma=0.1), confidence * iou, atol=1e-5)
    np.testing.assert_allclose(of(gamma=0.0), iou, atol=1e-6)
    np.testing.assert_allclose(-np.log(of(gamma=1.0) / iou), spread, atol=1e-5)


def test_urpa_leaves_out_what_cannot_be_read():
    said = jnp.concatenate([STARTS_AND_ENDS, jnp.array([[jnp.nan, 1e10]])])
    known = jnp.array([True, True, True, False])
    of = partial(urpa.consensus, agreement=urpa.overlap, gamma=0.1, ddof=1)
    np.testing.assert_allclose(of(said, known)[:3], of(STARTS_AND_ENDS, known[:3]), rtol=1e-6)
    assert of(said, known)[3] == 0 and not of(said, jnp.zeros(4, bool)).any()


@pytest.mark.parametrize(
    ("a", "b", "want"),
    [((0, 4), (2, 6), 2 / 6), ((0, 1), (2, 3), 0), ((0, 9), (2, 5), 3 / 9), ((5, 2), (1, 6), 0), ((3, 3), (3, 3), 0)],
)
def test_urpa_overlap(a, b, want):
    for x, y in ((a, b), (b, a)):
        np.testing.assert_allclose(urpa.overlap(jnp.array(x, float), jnp.array(y, float)), want, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "want", "known"),
    [
        ("from 3 to 12.5", [3, 12.5], True),
        ("1 2 03.25s, 40.", [3.25, 40], True),
        ("1.2.3", [1.2, 3], True),
        ("only 7", [0, 7], False),
        ("none.", [0, 0], False),
    ],
)
def test_numbers_are_read(text, want, known):
    ids = [*encode(text), EOS]
    tokens, mask = jnp.pad(jnp.array(ids), (0, 3), constant_values=ZERO + 9), jnp.arange(len(ids) + 3) < len(ids)
    numbers, there = last_numbers(tokens, mask, count=2, zero=ZERO, point=IDS["."])
    np.testing.assert_allclose(numbers, want, rtol=1e-6)
    assert there == known


def intervals(form):
    """Two groups, one of which agrees more."""
    texts = [["1-9", "2-8", "1-8"], ["1-9", "3-5", "6-8"]]
    tokens = jnp.array([[encode(text) for text in group] for group in texts])
    return toy_batch(logp=jnp.zeros(tokens.shape) - 1, tokens=tokens, outcome=form)


def test_urpa_confidence_cancels_where_the_deviation_is_divided_by():
    batch = intervals(jnp.ones((2, 3)))

    def advantages(**kwargs):
        return prepare(load("urpa", **kwargs), batch).advantage[..., 0]

    scaled = [advantages(gamma=gamma, credit=center_scale) for gamma in (0.0, 0.5)]
    np.testing.assert_allclose(*scaled, atol=1e-3)  # of eps
    plain, trusted = (advantages(gamma=gamma) for gamma in (0.0, 0.5))
    spread = [
        np.std([1, 2, 1], ddof=1) + np.std([9, 8, 8], ddof=1),
        np.std([1, 3, 6], ddof=1) + np.std([9, 5, 8], ddof=1),
    ]
    np.testing.assert_allclose(trusted, plain * np.exp(-0.5 * np.array(spread))[:, None], atol=1e-6)
    assert (jnp.abs(plain) > 0.01).any(1).all()


def test_urpa_adds_form_and_agreement():
    batch = prepare(load("urpa", gamma=0.0), intervals([[1.0, 0, 1], [0, 0, 0]]))
    start, end = np.mean([1, 2, 1]), np.mean([9, 8, 8])
    iou = [(end - start) / (9 - 1), 6 / (end - start), (8 - start) / (end - 1)]
    np.testing.assert_allclose(batch.reward[0], 0.5 * np.array([1, 0, 1]) + 0.5 * np.array(iou), rtol=1e-5)


def test_urpa_without_agreement_is_grpo():
    scores, batch = random_batch(jax.random.key(2))
    assert_equal_runs(load("urpa", form=1.0, weight=0.0, credit=center_scale), load("grpo"), scores, batch)


# --- COPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "bits", "sharp", "flat"),
    [
        ([1] * 8, 0.0, 4.53979e-5, 0.006693),
        ([1, 2, 1, 1, 1, 1, 2, 1], 0.811278, 0.998026, 0.280172),
        (list(range(8)), 3.0, 1.0, 0.999955),
    ],
)
def test_copo_gates_by_entropy_in_bits(answers, bits, sharp, flat):
    entropy = copo.answer_entropy(clusters(saying(answers), same=same_answer)[0], jnp.ones(8, bool))
    np.testing.assert_allclose(entropy, bits, atol=1e-5)
    credit = jnp.array([0.0, 0.5])
    np.testing.assert_allclose(copo.soft(entropy, credit), [sharp, sharp], rtol=1e-4)
    np.testing.assert_allclose(copo.soft(entropy, credit, slope=5.0, middle=1.0), [flat, flat], rtol=1e-4)
    np.testing.assert_allclose(copo.soft_with_forced(entropy, credit), [0, sharp], rtol=1e-4)
    np.testing.assert_array_equal(copo.forced(entropy, credit), [0, 1])


FOUR = [[1.0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


def test_copo_compares_prompts():
    batch = prepare(load("copo"), saying(*[[1, 1, 2, 2]] * 4, outcome=FOUR))
    want = np.array([1.095443, 0.547721, -0.547721, -1.095443])
    np.testing.assert_allclose(batch.advantage[..., 0], np.tile(want[:, None], (1, 4)), atol=1e-5)
    gate = 1 / (1 + np.exp(-20 * 0.5))  # one bit
    np.testing.assert_allclose(batch.weight[..., 0], np.array([0, gate, gate, 0])[:, None] * np.ones(4), atol=1e-6)


def test_copo_pays_agreement():
    """Uniform answers of 8: the factor is 1/8; of a group that agrees 1."""
    batch = saying(list(range(8)), [1] * 8, [1] * 8, outcome=[[1.0] * 8, [1.0] * 8, [0.0] * 8])
    found = prepare(load("copo", agreeing=True), batch).advantage[:, 0, 0]
    reward = np.array([0.125, 1, 0])
    np.testing.assert_allclose(found, (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6), rtol=1e-4)


def test_copo_prompts_without_rows_do_not_count():
    keep = np.ones((4, 4), bool)
    keep[1] = False
    found = prepare(load("copo"), saying(*[[1, 1, 2, 2]] * 4, outcome=FOUR, keep=keep)).advantage[:, 0, 0]
    reward = np.array([1, 0.25, 0])
    want = (reward - reward.mean()) / (reward.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(found, [want[0], 0, *want[1:]], rtol=1e-4)


def test_copo_blends_two_clipped_losses():
    """By hand, a token a row: ratios 1.5, 0.5, 4, 1 under advantages of both signs."""
    log_ratio = np.log([[1.5, 0.5, 4.0, 1.0]] * 4)
    batch = prepare(load("copo", kl=None), saying(*[[1, 1, 1, 2]] * 4, outcome=FOUR))
    got = evaluate(load("copo", kl=None).loss, Scores(logp=batch.rollouts.logp + log_ratio[..., None]), batch)

    def ppo(ratio, a):
        loss = -np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        return np.where(a < 0, np.minimum(loss, -3 * a), loss)

    reward, ratio = np.array(FOUR), np.exp(log_ratio)
    local = (reward - reward.mean(1, keepdims=True)) / (reward.std(1, ddof=1, keepdims=True) + 1e-6)
    across = np.array([1.095443, 0.547721, -0.547721, -1.095443])[:, None] + 0 * reward
    share = (local != 0) / (1 + np.exp(-20 * (0.811278 - 0.5)))
    want = share * ppo(ratio, local) + (1 - share) * ppo(ratio, across)
    np.testing.assert_allclose(got.value, want.mean(), rtol=1e-5)
    near = 1e-4
    slope = (
        share * (ppo(ratio * (1 + near), local) - ppo(ratio * (1 - near), local))
        + (1 - share) * (ppo(ratio * (1 + near), across) - ppo(ratio * (1 - near), across))
    ) / (2 * near)
    np.testing.assert_allclose(got.coefficient[..., 0], slope, rtol=1e-3, atol=1e-4)


def test_copo_forced_is_grpo_where_no_group_is_alike():
    scores, batch = random_batch(jax.random.key(4))
    parent = load("grpo", kl=0.001)
    surrogate = partial(dual_clip, low=0.2, high=0.2, bound=3.0)
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, surrogate=surrogate))
    assert (jnp.abs(prepare(parent, batch).advantage) > 0).any((1, 2)).all()
    assert_equal_runs(load("copo", gate=copo.forced), parent, scores, batch)
    soft = run(load("copo", gate=partial(copo.soft, middle=2.0)), scores, batch)[1]
    assert not np.allclose(soft, run(parent, scores, batch)[1])


# --- direct APO -------------------------------------------------------------------------------------------------------


def test_a_step_begins_after_an_end():
    tokens, exists = jnp.array([3, 9, 9, 4, 5, 9, 9, 9]), jnp.array([1, 1, 1, 1, 1, 1, 0, 0], bool)
    found = begins_step(tokens, exists, ends=(9,))
    np.testing.assert_array_equal(found, [1, 0, 1, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(begins_step(tokens, exists, ends=()), [1, 0, 0, 0, 0, 0, 0, 0])


def scripted(response, added, calls):
    """A world whose sampler says what is written: one response first, then how it goes on. 0 is padding."""

    def sample(key, prompts, size, context=None, sampling=None, length=8, limit=None, until=None, own=None):
        calls.append({"size": size, "context": context, "own": own})
        tokens = jnp.array(response if context is None else added)
        tokens = jnp.broadcast_to(tokens, (prompts.index.shape[0], size, tokens.shape[-1]))
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, length - tokens.shape[-1])))
        mask = tokens > 0
        if limit is not None:
            mask &= jnp.arange(length) < limit[..., None]
        return Rollouts(
            prompts=prompts,
            context=jax.tree.map(lambda x: x[:, None], prompts.context),
            tokens=tokens,
            mask=mask,
            role=jnp.where(mask, POLICY, PADDING).astype(jnp.int8),
            logp=jnp.where(mask, -tokens / 10.0, 0.0),
            entropy=jnp.zeros(tokens.shape),
            version=jnp.zeros(tokens.shape, jnp.int32),
            truncated=jnp.zeros(tokens.shape[:2], bool),
            sampling=Sampling(temperature=jnp.ones(tokens.shape[:2])),
        )

    def reward(rollouts):
        calls.append({"judged": rollouts})
        return (rollouts.mask * rollouts.tokens).sum(-1).astype(jnp.float32)

    sampling = Sampling(temperature=jnp.ones(()))
    return World(
        sample=sample, score=None, reward=reward, models={}, step=jnp.zeros((), jnp.int32), length=8, sampling=sampling
    )


def test_steps_are_drawn_from_the_beginning_of_a_step():
    """Of `3 9 4 5 9 6` the states are "", "3 9" and "3 9 4 5 9"; all are drawn."""
    states = {0: (3, 0), 2: (3, 9), 5: (3, 9, 4, 5, 9)}
    seen = set()
    for seed in range(12):
        calls = []
        world = scripted([3, 9, 4, 5, 9, 6], [[7, 9, 8, 1], [7, 7, 0, 0], [2, 9, 0, 0]], calls)
        rows = sample_steps(world, jax.random.key(seed), toy_prompts(1), size=3, ends=(9,))
        start = int(calls[1]["own"][0, 0])
        seen.add(start)
        assert calls[1]["size"] == 3
        text = [0, 1, *states[start][:start]]  # the prompt is 0 1
        np.testing.assert_array_equal(calls[1]["context"].tokens[0, 0, : len(text)], text)
        np.testing.assert_array_equal(calls[1]["context"].mask[0, 0].sum(), len(text))
        full = [([*states[start][:start], *more] + [0] * 8)[:8] for more in ([7, 9, 8, 1], [7, 7], [2, 9])]
        np.testing.assert_array_equal(jnp.where(rows.attended, rows.tokens, 0)[0], full)
        np.testing.assert_array_equal(rows.outcome[0], np.sum(full, 1))  # judged whole
        place = np.arange(8) - start
        np.testing.assert_array_equal(rows.mask[0], [(place >= 0) & (place < 2)] * 3)
        np.testing.assert_array_equal(first_token(rows)[0], [place == 0] * 3)
        after = [place == 2, place < -9, place < -9]
        np.testing.assert_array_equal(next_token(rows)[0], after)
        np.testing.assert_array_equal(rows.valued[0], (place == 0) | np.array(after))
        np.testing.assert_allclose(rows.logp[0], -np.array(full) / 10.0)
        assert rows.generated[0] == 6 + sum(min(n, 8 - start) for n in (4, 2, 2))
    assert seen == set(states)


def stepped(values, outcome, steps, **fields):
    """Rows `state step next`, where the critic says `values` (probabilities) before the last token; 0 has no next."""
    values = jnp.array(values)
    tokens = jnp.stack([jnp.full(values.shape, 5), jnp.array(steps), jnp.full(values.shape, 8)], -1)[None]
    mask = jnp.broadcast_to(jnp.array([False, True, False]), tokens.shape)
    role = jnp.array([POLICY, POLICY, POLICY]) * jnp.stack([values < 2, values < 2, values > 0], -1)[None]
    logit = jnp.log(values / (1 - values))
    value = jnp.stack([jnp.full_like(logit, jnp.nan), jnp.full_like(logit, 0.4), logit], -1)[None]
    batch = toy_batch(
        logp=jnp.zeros(tokens.shape) - 1, mask=mask, tokens=tokens, role=role, value=value, outcome=[outcome], **fields
    )
    valued = mask | next_token(batch.rollouts)
    return dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, valued=valued))


def test_direct_apo_advantages_are_of_the_critic_and_at_the_end_of_the_outcome():
    found = direct_apo.step_advantage(stepped([0.8, 0.5, 0.2], [0.0, 0, 1], [1, 2, 3]))
    np.testing.assert_allclose(found[0], [0.3, 0, -0.3], atol=1e-6)
    found = direct_apo.step_advantage(stepped([0.8, 0.0, 0.0], [0.0, 0, 7.0], [1, 2, 3]))
    np.testing.assert_allclose(found[0], [0.2, -0.6, 0.4], atol=1e-6)


def test_direct_apo_drops_repeated_steps_after_comparing_and_decided_states():
    batch = stepped([0.8, 0.8, 0.2, 0.2], [0.0] * 4, [1, 1, 2, 3])
    first = prepare(load("direct_apo"), batch)
    np.testing.assert_allclose(first.advantage[0, :, 1], [0.3, 0.3, -0.3, -0.3], atol=1e-6)
    np.testing.assert_array_equal(first.select[0, :, 1], [True, False, True, True])
    kept = prepare(load("direct_apo"), dataclasses.replace(batch, keep=jnp.array([[False, True, True, True]])))
    np.testing.assert_array_equal(kept.rows[0], [False, True, True, True])
    decided = prepare(load("direct_apo"), stepped([0.55, 0.5, 0.46], [0.0] * 3, [1, 2, 3]))
    assert not decided.rows.any()
    assert prepare(load("direct_apo"), stepped([0.55, 0.5, 0.44], [0.0] * 3, [1, 2, 3])).rows.all()


@pytest.mark.parametrize(("beta", "value"), [(0.1, 1.333333), (0.02, 65.333333)])
def test_direct_apo_regresses_sums_of_log_ratios(beta, value):
    ratio = jnp.array([[[0.4, 0.6], [0.0, jnp.nan], [-1.5, 0.5]]])
    mask = jnp.array([[[1, 1], [1, 0], [1, 1]]], bool)
    batch = toy_batch(logp=jnp.full((1, 3, 2), -1.0), mask=mask, advantage=[[0.3, 0.0, -0.3]])
    got = evaluate(RatioRegression(beta=beta), Scores(logp=ratio - 1), batch)
    np.testing.assert_allclose(got.value, value, rtol=1e-5)
    miss = np.array([1 - 0.3 / beta, 0, -1 + 0.3 / beta]) / 3 * 5
    np.testing.assert_allclose(got.coefficient[0], masked_rows(mask[0], miss), rtol=1e-4, atol=1e-5)
    same = dataclasses.replace(batch, advantage=jnp.zeros((1, 3, 2)))
    assert not evaluate(RatioRegression(beta=beta), Scores(logp=batch.rollouts.logp), same).coefficient.any()


def masked_rows(mask, per_row):
    return np.where(mask, np.array(per_row)[:, None], 0)


def test_direct_apo_critic_learns_how_often_a_state_is_solved():
    np.testing.assert_allclose(cross_entropy(jnp.log(0.6 / 0.4), 0.75), 0.612192, atol=1e-6)
    loss = load("direct_apo", value_weight=2.0).loss
    batch = stepped([0.8, 0.8, 0.2, 0.2], [1.0, 1, 1, 0], [1, 1, 2, 3])
    batch = whole_step(loss, Scores(logp=batch.rollouts.logp), prepare(load("direct_apo"), batch))
    logit = jnp.log(0.6 / 0.4)

    def of(value):
        return loss(Scores(logp=batch.rollouts.logp, value=value), batch)[1]["loss/success_rate_loss"]

    found, slope = jax.value_and_grad(of)(jnp.full((1, 4, 3), logit).at[..., 0].set(jnp.nan))
    np.testing.assert_allclose(found, 2 * 0.612192, atol=1e-5)
    want = np.zeros((1, 4, 3))
    want[..., 1] = 2 * (0.6 - 0.75) / 4  # the repeated row, which the policy does not learn from, included
    np.testing.assert_allclose(slope, want, atol=1e-6)


def test_direct_apo_of_whole_responses_is_reinforce_with_centred_rewards():
    _, batch = random_batch(jax.random.key(6))
    mixed = jnp.zeros(batch.outcome.shape).at[:, 0].set(1.0)
    batch = dataclasses.replace(batch, outcome=mixed, old=None, value=jnp.zeros(batch.mask.shape))
    parent = dataclasses.replace(load("reinforce"), advantage=partial(per_group, center))
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, aggregate=sequence_mean_token_sum))
    scores = Scores(logp=batch.rollouts.logp, value=jnp.zeros(batch.mask.shape))
    got, want = (run(x, scores, batch)[1] for x in (load("direct_apo", beta=0.5), parent))
    np.testing.assert_allclose(got, want / 0.5, rtol=1e-5, atol=1e-6)
    assert jnp.abs(want).max() > 0.1


# --- PROPS ------------------------------------------------------------------------------------------------------------


def bandit(tokens):
    """`(models, batch, learn)` of a policy of two logits, and of rows of one token it drew with probability 1/2."""
    tokens = jnp.array(tokens, jnp.int32)[:, None, None]
    half = jnp.full(tokens.shape, jnp.log(0.5))
    batch = toy_batch(logp=half, old=half, tokens=tokens)

    def gradient(models, part, loss):
        def of(logits):
            scores = Scores(logp=jax.nn.log_softmax(logits)[part.rollouts.tokens])
            return loss(scores, whole_step(loss, scores, part))

        (value, found), slope = jax.value_and_grad(of, has_aux=True)(models[0]["policy"])
        return (value, found), {"policy": slope}

    learn = Learn(step=None, objective=None, gradient=gradient, world=None, batch=None)
    return ({"policy": jnp.zeros(2)}, {}), batch, learn


SIX_TO_FOUR = [0] * 6 + [1] * 4
SEEN = partial(already_seen, clip=0.3)


def test_props_takes_probability_from_what_was_sampled():
    models, batch, learn = bandit(SIX_TO_FOUR)
    _, slope = learn.gradient(models, batch, SEEN)
    np.testing.assert_allclose(slope["policy"], [0.1, -0.1], atol=1e-6)  # of the mean log-prob: ROS
    adapt = partial(descended, jax.random.key(0), models, batch, learn, loss=SEEN, norm=10.0, minibatches=1)
    once, _ = adapt(rate=1e-3, target=0.01, epochs=1)
    np.testing.assert_allclose(once, [-1e-3, 1e-3], rtol=1e-3)  # Adam's first step, away from the arm drawn too often
    empty = dataclasses.replace(batch, keep=jnp.zeros((10, 1), bool))
    nothing, kl = descended(
        jax.random.key(0), models, empty, learn, loss=SEEN, norm=1.0, rate=0.1, target=0.01, epochs=3, minibatches=1
    )
    assert not nothing.any() and kl == 0


def test_props_stops_at_the_divergence():
    """Arm 0 alone was drawn. What is measured before a step is the divergence after the one before."""
    models, batch, learn = bandit([0] * 4)
    adapt = partial(descended, jax.random.key(0), models, batch, learn, loss=SEEN, norm=10.0, rate=0.1)
    one, two = (adapt(target=jnp.inf, epochs=n, minibatches=1)[0] for n in (1, 2))
    difference = float(jax.nn.log_softmax(one)[0] - jnp.log(0.5))
    divergence = np.exp(difference) - 1 - difference
    for factor, want in ((0.99, two), (1.01, adapt(target=jnp.inf, epochs=3, minibatches=1)[0])):
        stopped, last = adapt(target=factor * divergence, epochs=3, minibatches=1)
        np.testing.assert_allclose(stopped, want, rtol=1e-5)
    assert last > 1.5 * divergence and one[0] > two[0] > stopped[0]
    parts, _ = adapt(target=jnp.inf, epochs=1, minibatches=2)  # rows are all alike
    np.testing.assert_allclose(parts, two, rtol=1e-5)
    with pytest.raises(ValueError, match="4 prompts do not divide into 3"):
        adapt(target=jnp.inf, epochs=1, minibatches=3)


def test_props_clips_what_was_taken():
    g = jnp.array([[[0.5, 0.69, 0.71, 1.0, 1.5]]])
    batch = toy_batch(logp=jnp.zeros((1, 1, 5)), old=jnp.zeros((1, 1, 5)))
    got = evaluate(SEEN, Scores(logp=jnp.log(g)), batch)
    np.testing.assert_allclose(got.value, np.mean([0.7, 0.7, 0.71, 1.0, 1.5]), rtol=1e-6)
    np.testing.assert_allclose(got.coefficient[0, 0], [0, 0, 0.71, 1.0, 1.5], rtol=1e-6)
    np.testing.assert_allclose(got.metrics["behaviour_kl"], np.mean(g - 1 - np.log(g)), rtol=1e-5)


@pytest.mark.parametrize("fill", [jnp.nan, 1e10])
def test_props_masked_tokens_change_no_bit(fill):
    def of(fill):
        got = evaluate(SEEN, *random_batch(jax.random.key(3), fill=fill))
        return got.value, got.coefficient, got.metrics

    jax.tree.map(np.testing.assert_array_equal, of(0.0), of(fill))
    assert of(0.0)[1].any()


def test_props_joins_what_two_policies_drew_and_learns_as_if_one_had():
    seen = []
    first = toy_batch(logp=jnp.zeros((2, 2, 1)), tokens=jnp.ones((2, 2, 1), int), outcome=[[1.0, 0], [3, 4]])
    first = dataclasses.replace(first, keep=jnp.array([[True, True], [True, False]]))

    def world(models):
        token = models[0]["policy"].astype(jnp.int32)

        def sample(key, prompts, size):
            tokens = jnp.broadcast_to(token, (2, size, 1))
            return dataclasses.replace(toy_batch(logp=tokens - 10.0, tokens=tokens).rollouts, prompts=prompts)

        return World(
            sample=sample,
            score=None,
            reward=lambda rollouts: 10.0 * rollouts.tokens[..., 0],
            models=models[0],
            step=jnp.zeros((), jnp.int32),
            length=1,
        )

    def fresh(models, rollouts):
        seen.append((models[0]["policy"], rollouts))
        outcome = jnp.nan_to_num(rollouts.outcome)
        return dataclasses.replace(first, rollouts=rollouts, outcome=outcome, keep=~jnp.isnan(rollouts.outcome))

    def step(models, batch, loss=None):
        seen.append(batch)
        return models, {}

    learn = Learn(step=step, objective=None, gradient=None, world=world, batch=fresh)
    parts = []

    def behave(key, models, batch, learn):
        parts.append(batch.rollouts.tokens.shape)
        return models[0]["policy"] + len(parts), jnp.array(0.5)

    models = {"policy": jnp.array(4.0)}, {}
    algorithm = load("props", rounds=2, group_size=6)
    update = partial(algorithm.update, behave=behave, update=one_pass)
    new, metrics = update(jax.random.key(0), models, first, learn)
    batch = seen[-1]
    assert isinstance(batch, Batch) and parts == [(2, 2, 1), (2, 4, 1)] and metrics == {"behaviour_kl": 0.5}
    assert [float(x[0]) for x in seen[:-1]] == [4.0, 4.0] and new == models  # scored by the policy
    np.testing.assert_array_equal(batch.rollouts.tokens[..., 0], [[1, 1, 5, 5, 6, 6]] * 2)
    np.testing.assert_array_equal(batch.outcome, [[1, 0, 50, 50, 60, 60], [3, 0, 50, 50, 60, 60]])
    np.testing.assert_array_equal(batch.rows, [[1] * 6, [1, 0, 1, 1, 1, 1]])
    want = jax.vmap(center_scale)(batch.outcome, batch.rows)  # one group
    np.testing.assert_allclose(batch.advantage[..., 0], want)


def test_props_learns_on_the_policys_own_ratio_and_is_grpo_when_it_is_the_samplers():
    scores, batch = random_batch(jax.random.key(5))
    sampled = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, logp=batch.old.logp))
    assert_equal_runs(load("props"), load("grpo", kl=None), scores, sampled)
    np.testing.assert_array_equal(run(load("props"), scores, batch)[1], run(load("props"), scores, sampled)[1])
    with pytest.raises(ValueError, match="group_size=8 must divide by rounds=2"):
        load("props", rounds=2)


# --- OSPO -------------------------------------------------------------------------------------------------------------


def numpy_one_step(reward, acted, fairness):
    """The released code's `feedback`, turn by turn, over the agents of one environment."""
    earned, result = np.zeros(len(reward)), np.zeros(reward.shape)
    for t in range(reward.shape[1]):
        before, who = earned.std(), acted[:, t]
        earned = earned + np.where(who, reward[:, t], 0)
        now = reward[who, t]
        result[who, t] = (now - now.mean()) / (now.std() + 1e-8) - fairness * (earned.std() - before)
    return result


def test_ospo_compares_what_is_earned_in_a_turn():
    rng = np.random.default_rng(0)
    reward, acted = rng.normal(size=(5, 4)), rng.random((5, 4)) < 0.7
    acted[0], acted[:, 1] = True, True
    for fairness in (0.0, 1.0):
        found = one_step(jnp.array(reward), jnp.array(acted), fairness=fairness)
        np.testing.assert_allclose(found, numpy_one_step(reward, acted, fairness), rtol=1e-4, atol=1e-5)
    plain = one_step(jnp.array(reward), jnp.array(acted), fairness=0.0)
    np.testing.assert_allclose(plain.sum(0), 0, atol=1e-5)
    poisoned = one_step(jnp.where(acted, reward, jnp.nan), jnp.array(acted), fairness=1.0)
    np.testing.assert_array_equal(poisoned, one_step(jnp.array(reward), jnp.array(acted), fairness=1.0))
    assert not one_step(jnp.full((5, 3), 0.3), jnp.ones((5, 3), bool), fairness=1.0).any()


def test_ospo_takes_the_growth_of_inequality_from_all():
    """Earned 1 and 0, then 0 and 1: the deviation grows by 1/2, then shrinks by it."""
    found = one_step(jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.ones((2, 2), bool), fairness=1.0)
    np.testing.assert_allclose(found, [[1 - 0.5, -1 + 0.5], [-1 - 0.5, 1 + 0.5]], atol=1e-6)
    np.testing.assert_allclose(spread(jnp.array([[1e30], [-1e30]]), jnp.ones((2, 1), bool)), [1e30], rtol=1e-6)


def test_ospo_turns_are_steps():
    reward = jnp.array([[[0.0, 1.0, 2.0, 0.0], [0.0, 0.0, 5.0, 1.0]]])
    mask = jnp.array([[[1, 1, 1, 1], [1, 1, 0, 1]]], bool)
    batch = toy_batch(logp=jnp.zeros((1, 2, 4)), mask=mask, reward=reward)
    rollouts = dataclasses.replace(batch.rollouts, turn=jnp.array([[[0, 0, 1, 1], [0, 0, 1, 1]]]))
    found = load("ospo", turns=2, fairness=0.0).advantage(dataclasses.replace(batch, rollouts=rollouts))
    np.testing.assert_allclose(found[0], [[1, 1, 1, 1], [-1, -1, 0, -1]], atol=1e-6)
    whole = load("ospo", fairness=0.0).advantage(batch)  # one turn: 3 and 1
    np.testing.assert_allclose(whole[0], [[1, 1, 1, 1], [-1, -1, 0, -1]], atol=1e-6)


def test_ospo_of_one_turn_is_grpo_with_the_populations_deviation():
    scores, batch = random_batch(jax.random.key(7))
    parent = load("grpo", kl=None)
    loss = dataclasses.replace(load("ospo", entropy=None).loss.keywords["loss"])
    parent = dataclasses.replace(
        parent, advantage=partial(per_group, partial(center_scale, ddof=0, eps=1e-8)), loss=loss
    )
    child = load("ospo", fairness=0.0, entropy=None, weight=0.0)
    assert_equal_runs(child, parent, scores, batch)
    fair = run(load("ospo", entropy=None, weight=0.0), scores, batch)[1]
    assert not np.allclose(fair, run(parent, scores, batch)[1])


def test_ospo_is_held_to_the_best_policy_in_the_loss():
    scores, batch = random_batch(jax.random.key(7))
    free, held = (run(load("ospo", weight=w), scores, batch) for w in (0.0, 2.0))
    d = np.where(prepare(load("ospo"), batch).mask, scores.logp - batch.reference.logp, 0.0)
    n = (d != 0).sum()
    np.testing.assert_allclose(held[0] - free[0], 2 * np.sum(np.exp(-d) + d - 1) / n, rtol=1e-4)
    np.testing.assert_allclose(held[1] - free[1], 2 * d, rtol=1e-3, atol=1e-5)  # of the reverse divergence


def judgements(*rewards, every=1):
    memory, best = no_best(None), []
    for step, reward in enumerate(rewards):
        batch = toy_batch(logp=jnp.zeros((1, 2, 1)), outcome=[[reward, reward]])
        memory, found = judged(memory, dataclasses.replace(batch, step=jnp.array(step)), every=every)
        best.append(bool(found))
    return best, bool(memory["worse"]), float(memory["reward"])


def test_ospo_remembers_the_best():
    assert judgements(-1.0, 0.5, 0.6) == ([True, True, True], False, pytest.approx(0.6))
    assert judgements(-1.0, -1.0, 0.6) == ([True, False, True], True, pytest.approx(0.6))
    assert judgements(0.5, 9.0, 0.4, 9.0, every=2) == ([True, False, False, False], True, 0.5)


@pytest.mark.parametrize(
    ("reward", "weights", "params", "reference"),
    [
        (2.0, [0.0] * 3, 3.0, 0.0),  # better: no divergence yet, every pass counts, the policy of the step is the best
        (0.5, [0.5, 0.5, 1.0], 1.0, -5.0),  # not better: from the second pass on it is too far, and stays
    ],
)
def test_ospo_skips_what_goes_too_far(reward, weights, params, reference):
    batch = toy_batch(
        logp=jnp.full((1, 2, 1), -1.0),
        reference=jnp.full((1, 2, 1), -2.0),
        outcome=[[reward] * 2],
        advantage=[[0.0] * 2],
    )
    seen = []

    def learn(models, part, loss):
        jax.debug.callback(
            lambda w, r: seen.append((float(w), float(r))), loss.keywords["weight"], part.reference.logp[0, 0, 0]
        )
        new = {**models[0], "policy": models[0]["policy"] + 1}
        return (new, models[1]), {"kl": 0.006 + 0.006 * models[0]["policy"]}

    memory = {"reward": jnp.array(1.0), "known": jnp.array(True), "worse": jnp.array(False)}
    start = {"policy": jnp.array(0.0), "reference": jnp.array(-5.0)}, {}
    update = partial(load("ospo", updates=3, every=1).update.apply, memory, jax.random.key(0))
    (models, metrics), _ = update(start, batch, learn)
    jax.effects_barrier()
    assert [w for w, _ in seen] == weights
    assert {r for _, r in seen} == {-1.0 if reward > 1 else -2.0}
    assert models[0]["policy"] == params and models[0]["reference"] == reference
    np.testing.assert_allclose(metrics["skipped"], 0 if reward > 1 else 2 / 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["turns", "every", "updates"])
def test_ospo_refuses(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        load("ospo", **{name: 0})
