"""Methods whose advantage compares rows in a way of their own: mc_grpo, passk, riskpo, spo_single_stream, adora."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import bundles
from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithms import adora, load, mc_grpo, passk, riskpo, spo_single_stream
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts import tracker
from jaxrl_llm.testing import compiled, evaluate, prepare, random_batch, toy_batch, toy_prompts
from jaxrl_llm.types import Problem, Sampling, Scores, World
from jaxrl_llm.weights.basic import ones

FIVE = np.ones(5, bool)
center_median_scale, is_pivot = compiled(mc_grpo.center_median_scale), compiled(mc_grpo.is_pivot)


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def assert_equal(child, parent, seed=4, **batch):
    """Both losses have the same value and the same gradient, which is not 0."""
    scores, batch = random_batch(jax.random.key(seed), **batch)
    got, want = (evaluate(a.loss, scores, prepare(a, batch)) for a in (child, parent))
    close(got.value, want.value)
    close(got.coefficient, want.coefficient)
    assert np.asarray(got.coefficient).any()


# --- mc_grpo ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 7.0])
def test_distances_from_the_median_over_their_median(shift):
    reward = np.array([0.1, 0.4, 0.5, 0.9, 1.0]) + shift
    close(center_median_scale(reward, FIVE), [-0.997506, -0.249377, 0, 0.997506, 1.246883], atol=1e-4)
    np.testing.assert_array_equal(is_pivot(reward, FIVE), [0, 0, 1, 0, 0])


def test_a_majority_of_equal_rewards_does_not_blow_up():
    reward = np.array([1.0, 0, 0, 0, 1])
    np.testing.assert_array_equal(center_median_scale(reward, FIVE), [1, 0, 0, 0, 1])
    np.testing.assert_array_equal(is_pivot(reward, FIVE), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("poison", [np.nan, 1e10])
def test_the_median_is_that_of_rows_that_count(poison):
    reward, keep = np.array([0.9, poison, 0.5, 0.1, poison]), np.array([1, 0, 1, 1, 0], bool)
    close(center_median_scale(reward, keep), [0.997506, 0, 0, -0.997506, 0])
    np.testing.assert_array_equal(is_pivot(reward, keep), [0, 0, 1, 0, 0])
    nobody = np.zeros(5, bool)
    assert not center_median_scale(reward, nobody).any() and not is_pivot(reward, nobody).any()


def test_the_pivot_leaves_numerator_and_denominator():
    scores, batch = random_batch(jax.random.key(3), size=5)
    algorithm = load("mc_grpo", group_size=4)
    prepared = jax.tree.map(np.asarray, prepare(algorithm, batch))
    pivot = prepared.rollouts.mask & prepared.keep[..., None] & ~prepared.mask
    np.testing.assert_array_equal(pivot.any(-1).sum(-1), 1)
    assert not prepared.advantage[pivot].any()
    got = evaluate(algorithm.loss, scores, prepared)
    assert not np.asarray(got.coefficient)[pivot].any()
    close(compiled(algorithm.loss.aggregate)(prepared.mask).sum(), 1)


def test_mc_grpo_with_the_mean_and_all_rows_is_grpo():
    child = dataclasses.replace(load("mc_grpo", group_size=4), advantage=partial(per_group, center_scale), weight=ones)
    assert_equal(child, load("grpo", group_size=5), size=5)


def test_mc_grpo_needs_an_odd_number_of_samples():
    with pytest.raises(ValueError, match="even"):
        load("mc_grpo", group_size=7)


# --- passk ------------------------------------------------------------------------------------------------------------


pass_at = {k: compiled(passk.pass_at_k, k=k) for k in (2, 3, 4, 8, 64)}


@pytest.mark.parametrize(
    "size, wrong, k, right, others",
    [
        (8, 6, 4, 0.522232, -0.174077),
        (8, 4, 4, 0.120385, -0.120385),
        (4, 3, 2, 0.999998, -0.333333),
        (8, 7, 8, 0, 0),
        (8, 8, 4, 0, 0),
        (8, 0, 4, 0, 0),
        (8, 3, 4, 0, 0),
    ],
)
def test_pass_at_k(size, wrong, k, right, others):
    is_right = np.arange(size) >= wrong
    got = pass_at[k](is_right.astype(np.float32), np.ones(size, bool))
    close(got, np.where(is_right, right, others), atol=2e-5)
    close(got.sum(), 0, atol=1e-4)


def test_pass_at_k_is_the_mean_over_all_sets():
    """Enumerated: each sample's mean advantage over the sets it is in, rewards of sets centred and scaled by theirs."""
    reward = np.array([1, 0, 0, 1, 0, 0])
    sets = list(itertools.combinations(range(6), 3))
    paid = np.array([max(reward[list(s)]) for s in sets], float)
    standard = (paid - paid.mean()) / paid.std()
    want = [np.mean([z for s, z in zip(sets, standard, strict=True) if i in s]) for i in range(6)]
    close(pass_at[3](np.array(reward, np.float32), np.ones(6, bool)), want, atol=1e-4)


def test_combinations_of_large_groups_are_finite():
    wrong = np.arange(256) >= 3
    got = pass_at[64]((~wrong).astype(np.float32), np.ones(256, bool))
    failed = np.prod([(253 - i) / (256 - i) for i in range(64)])
    close(got[0], failed / np.sqrt(failed * (1 - failed)), rtol=1e-3)


@pytest.mark.parametrize("poison", [np.nan, 1e10])
def test_sets_are_drawn_from_rows_that_count(poison):
    reward, keep = np.array([1.0, poison, 0, 0, 0, poison]), np.array([1, 0, 1, 1, 1, 0], bool)
    close(pass_at[2](reward, keep), [0.999998, 0, -0.333333, -0.333333, -0.333333, 0], atol=2e-5)


def test_pass_at_1_is_grpo_with_the_deviation_of_the_population():
    parent = load("grpo", kl=None)
    parent = dataclasses.replace(
        parent,
        advantage=partial(per_group, partial(center_scale, ddof=0)),
        loss=dataclasses.replace(parent.loss, surrogate=partial(clip_min, low=0.2, high=0.28), aggregate=token_mean),
    )
    assert_equal(load("passk", k=1), parent)
    with pytest.raises(ValueError, match="k must be"):
        load("passk", group_size=4, k=5)


# --- riskpo -----------------------------------------------------------------------------------------------------------

SCORES = np.arange(5, dtype=np.float32)
UNKNOWN = {"bounds": np.zeros(2, np.float32), "known": np.zeros((), bool)}
quantiles = compiled(bundles.quantiles)


def credit_of(reward, keep=None, *, tracker=UNKNOWN, levels=(0.2, 0.8), **how):
    """The credit of one bundle's responses; of papers, where nothing splits it."""
    reward = np.atleast_2d(reward)
    keep = np.ones(reward.shape, bool) if keep is None else keep
    return np.asarray(credit_program(reward, keep, tracker, np.array(levels), **how))


@partial(jax.jit, static_argnames=("tail", "natural", "which", "split"))
def credit_program(reward, keep, tracker, levels, tail=1.5, natural=False, which=bundles.of_bundle, split=bundles.same):
    risk = partial(riskpo.value_at_risk, tail=tail, natural=natural)
    return riskpo.of_papers(bundles.papers_of(reward, keep), tracker, levels, risk=risk, which=which, split=split)


def test_quantiles_are_interpolated():
    close(quantiles(SCORES, FIVE, np.array([0.2, 0.8])), [0.8, 3.2])
    poisoned = np.array([2.0, np.nan, 0.0, 1e10, 1.0])
    close(quantiles(poisoned, np.array([1, 0, 1, 0, 1], bool), np.array([0.25, 1.0])), [0.5, 2.0])
    assert not quantiles(SCORES, ~FIVE, np.array([0.2, 0.8])).any()


@pytest.mark.parametrize(
    "natural, tail, want",
    [
        (True, 0.0, [-3.999993, -3.666661, -1.999997, -0.333333, 0]),
        (True, 1.5, [-3.999985, -1.466664, -0.799999, -0.133333, 0]),
        (False, 1.5, [-2.399988, 0.133333, 0.799999, 1.466664, 1.599997]),
    ],
)
def test_value_at_risk(natural, tail, want):
    risk = compiled(riskpo.value_at_risk, tail=tail, natural=natural)
    got = risk(SCORES, np.array([0.8, 3.2]), np.array([0.2, 0.8]))
    close(got, want, atol=2e-5)
    assert (np.diff(got) >= 0).all()


@pytest.mark.parametrize(
    "natural, want",
    [
        (True, [-2.529811, -0.927599, -0.505963, -0.084327, 0]),
        (False, [-1.517885, 0.084327, 0.505963, 0.927599, 1.011927]),
    ],
)
def test_a_papers_credit_is_its_value_at_risk_over_the_deviation(natural, want):
    close(credit_of(SCORES, natural=natural)[0], want, atol=2e-5)


def test_equal_papers_have_no_credit():
    for which in (bundles.of_bundle, bundles.of_history, bundles.between):
        assert not credit_of(np.full((3, 4), 0.1), which=which).any()


def test_tracked_quantiles_replace_the_bundles_own_once_they_are_known():
    known = {"bounds": np.array([1.0, 2.0]), "known": np.ones((), bool)}
    std = np.sqrt(2.5)
    for which, low, high in ((bundles.of_history, 1.0, 2.0), (bundles.between, 0.9, 2.6)):
        want = (np.clip(SCORES, low, high) - low) / 0.6 - 1.5 * np.maximum(low - SCORES, 0) / 0.2
        close(credit_of(SCORES, tracker=known, which=which)[0], want / 2.5 / std, atol=2e-5)
        close(credit_of(SCORES, which=which), credit_of(SCORES))


def test_a_papers_credit_is_split_by_the_distance_from_the_questions_mean():
    reward = np.array([[1.0, 0, 0, 0], [1, 1, 0, 1]])
    whole, parts = credit_of(reward)[0], credit_of(reward, split=bundles.by_deviation)
    np.testing.assert_array_equal(credit_of(reward)[1], whole)
    close(parts.sum(0), whole)
    # Papers 2 and 4 are 1/4 below one mean and 1/4 above the other: nothing tells the questions apart.
    close(parts[:, [1, 3]], np.stack([whole / 2, whole / 2])[:, [1, 3]])
    close(parts[0, 0] / parts[1, 0], 3.0)
    close(parts[0, 2] / parts[1, 2], 1 / 3)


def test_a_papers_credit_over_the_deviation_of_each_question():
    reward = np.array([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    whole, parts = credit_of(reward), credit_of(reward, split=bundles.over_deviation)
    close(parts, whole / np.array([[0.5], [1.0]]))


@pytest.mark.parametrize("poison", [np.nan, 1e10])
def test_papers_are_made_of_responses_that_count(poison):
    reward = np.array([[poison, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0], [poison] * 4])
    keep = np.array([[0, 1, 1, 1], [1, 1, 0, 1], [0, 0, 0, 0]], bool)
    papers = compiled(bundles.papers_of)(reward, keep)
    np.testing.assert_array_equal(papers.score, [1, 0, 2, 0])
    np.testing.assert_array_equal(papers.exist, [1, 1, 1, 0])
    for split in (bundles.same, bundles.by_deviation, bundles.over_deviation):
        got = credit_of(reward, keep, split=split)
        assert np.isfinite(got).all() and not got[~keep].any()
    got = credit_of(reward, keep)
    np.testing.assert_array_equal(got[0, 1:], got[1, np.array([0, 1, 3])])


def test_later_responses_of_the_larger_question_have_no_credit():
    keep = np.array([[1, 1, 1, 1], [1, 0, 1, 0]], bool)
    got = credit_of(np.array([[1.0, 0, 1, 1], [1, 1, 0, 1]]), keep)
    assert not got[0, 2:].any() and (got[0, :2] != 0).all()


def test_the_last_bundle_is_what_is_left():
    _, batch = random_batch(jax.random.key(2), prompts=3)
    split = {n: np.asarray(prepare(load("riskpo", bundle=n), batch).advantage) for n in (2, 5)}
    last = jax.tree.map(lambda x: np.asarray(x)[2:] if jnp.ndim(x) else x, batch)
    close(split[2][2:], prepare(load("riskpo", bundle=1), last).advantage)
    close(split[5], prepare(load("riskpo", bundle=3), batch).advantage)
    with pytest.raises(ValueError, match="bundle"):
        load("riskpo", bundle=0)


def test_tracker_moves_against_the_share_of_papers_below_it():
    """Papers of two bundles, of one question each: 1, 2, 3 and 1, 0."""
    batch = toy_batch(
        logp=jnp.zeros((2, 3, 1)), outcome=jnp.array([[1.0, 2, 3], [1, 0, jnp.nan]]), keep=[[1, 1, 1], [1, 1, 0]]
    )
    program = compiled(riskpo.tracked, size=1, low=0.2, high=0.8, rate=0.1)

    def move(memory, batch=batch):
        return program(memory, batch=batch)

    first = move(UNKNOWN)
    close(first["bounds"], [0.8, 2.2])
    assert first["known"]
    second = move({"bounds": jnp.array([2.0, 2.5]), "known": jnp.ones((), bool)})
    close(second["bounds"], [1.96, 2.5])
    nothing = dataclasses.replace(batch, keep=jnp.zeros((2, 3), bool))
    close(move(second, batch=nothing)["bounds"], [1.96, 2.5])
    assert not move(UNKNOWN, batch=nothing)["known"]


def test_riskpo_reads_the_tracker_of_the_steps_before():
    stage = load("riskpo", bundle=1, which=bundles.of_history).advantage
    batch = toy_batch(logp=jnp.zeros((1, 5, 1)), outcome=SCORES[None])
    first, memory = stage.apply(UNKNOWN, jax.random.key(0), batch)
    assert not memory["known"]
    other = toy_batch(logp=jnp.zeros((1, 5, 1)), outcome=SCORES[None] + 10)
    second, _ = stage.apply(stage.observe(memory, batch), jax.random.key(0), other)
    close(first[0, :, 0], credit_of(SCORES, split=bundles.by_deviation)[0])
    close(second[0, :, 0], 2.4 / 0.6 / 2.5 / np.sqrt(2.5))  # all above the upper quantile


def above_lowest(reward, keep):
    return (reward - jnp.min(reward, where=keep, initial=jnp.inf)) / (jnp.std(reward, where=keep, ddof=1) + 1e-6)


def test_riskpo_without_risk_is_linear_and_with_one_question_grpo_above_the_lowest():
    close(jnp.diff(credit_of(SCORES, tail=0.0, levels=(0.0, 1.0))[0]), 1 / np.sqrt(2.5))
    parent = dataclasses.replace(load("grpo", kl=None), advantage=partial(per_group, above_lowest))
    assert_equal(load("riskpo", bundle=1, low=0.0, high=1.0, tail=0.0), parent)


# --- spo_single_stream ------------------------------------------------------------------------------------------------

FORGET = {"half": 0.06, "lowest": 0.875, "highest": 0.96}


def problem(rows=4, prompts=2):
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), toy_prompts(prompts))
    sampling = Sampling(temperature=jnp.ones(()))
    return Problem(rows=rows, prompts=prompts, length=2, vocab=8, params={}, example=example, sampling=sampling)


def policy_at(logp):
    """A world whose policy gives this log-prob to every token."""

    def sample(key, prompts, size):
        rollouts = toy_batch(logp=jnp.full((prompts.index.size, size, 2), logp)).rollouts
        return dataclasses.replace(
            rollouts, prompts=prompts, context=jax.tree.map(lambda x: x[:, None], prompts.context)
        )

    def score(role, rollouts):
        return Scores(logp=jnp.where(rollouts.mask, logp, 0.0))

    return World(sample=sample, score=score, reward=None, models={}, step=jnp.zeros((), jnp.int32), length=2)


def prompts_at(*index):
    return jax.tree.map(lambda x: x[jnp.array(index)], toy_prompts(4))


def test_the_estimate_starts_with_what_earlier_samples_say():
    value, count = tracker.from_samples(problem(), successes=jnp.array([3, 0, 8, 4]))
    close(value, [3.5 / 9, 0.5 / 9, 8.5 / 9, 0.5])
    close(count, 8)
    close([x[0] for x in tracker.undecided(problem())], [0.5, 1.0])


def test_the_past_fades_as_the_policy_moves():
    close(
        tracker.forgetting(jnp.array([0.0, 0.006, 0.01, 0.012]), **FORGET), [0.96, 0.933033, 0.890899, 0.875], atol=1e-6
    )


def test_an_observation_is_that_of_a_beta_whose_counts_fade():
    estimate = np.array([0.388889], np.float32), np.array([8.0], np.float32)
    seen = (np.int32(0), np.float32(1.0), np.float32(0.933033), np.bool_(True))
    observed = compiled(tracker.observed)
    (value, count), _ = observed(estimate, seen)
    close([value[0], count[0]], [0.461088, 3.902769 + 4.561495], atol=1e-5)
    for _ in range(300):
        (value, count), _ = observed((value, count), seen)
    close(count, 1 / (1 - 0.933033), rtol=1e-4)
    same, _ = observed((value, count), (seen[0], np.float32(np.nan), seen[2], np.bool_(False)))
    np.testing.assert_array_equal(np.stack(same), np.stack([value, count]))


def test_prompts_that_may_go_either_way_come_first():
    got = spo_single_stream.priority(jnp.array([0, 0.1, 0.5, 0.9, 1, -3, 1e6]), explore=0.05)
    close(got, [0.05, 0.35, 0.55, 0.35, 0.05, 0.05, 0.05])


def test_advantages_are_whitened_over_the_batch():
    batch = toy_batch(logp=jnp.zeros((5, 1, 2)), outcome=jnp.array([[1.0], [0], [1], [0], [jnp.nan]]))
    rollouts = dataclasses.replace(
        batch.rollouts, credit=jnp.broadcast_to(-jnp.array([0.3, 0.3, 0.9, 0.5, 0.1])[:, None, None], (5, 1, 2))
    )
    batch = dataclasses.replace(batch, rollouts=rollouts, keep=jnp.array([[1], [1], [1], [1], [0]], bool))
    got = compiled(spo_single_stream.above_expected)(batch)
    close(got[..., 0, 0], [1.322876, -0.566947, 0.188982, -0.944911, 0])
    np.testing.assert_array_equal(got[..., 0], got[..., 1])


def test_estimates_change_after_the_update_and_row_by_row():
    """Prompt 1 is answered twice, then again after the policy moved by 0.006; prompt 2 cannot be scored."""
    stage = load("spo_single_stream", candidates=1).rollout
    memory, key = stage.init(problem()), jax.random.key(0)

    def step(memory, logp, index, outcome, keep):
        return program(memory, logp, index, np.array(outcome)[:, None], np.array(keep, bool)[:, None])

    @compiled
    def program(memory, logp, index, outcome, keep):
        prompts = jax.tree.map(lambda x: x[jnp.array(index)], toy_prompts(4))
        rollouts, memory = stage.apply(memory, key, policy_at(logp), prompts)
        batch = toy_batch(logp=rollouts.logp, outcome=outcome, keep=keep)
        return rollouts, stage.observe(memory, dataclasses.replace(batch, rollouts=rollouts))

    rollouts, memory = step(memory, -1.0, (1, 1), [1.0, 0.0], [1, 1])
    close(rollouts.credit, -0.5)
    close(memory["value"], 0.5)
    rollouts, memory = step(memory, -1.0, (1, 2), [1.0, jnp.nan], [1, 0])
    first = 0.5 + 0.5 / 1.96
    second = first - first / (0.96 * 1.96 + 1)
    close(rollouts.credit[:, 0, 0], [-second, -0.5])
    close(memory["value"], [0.5, second, 0.5, 0.5])
    rollouts, memory = step(memory, -1.006, (1, 3), [1.0, 1.0], [1, 1])
    count = 0.933033 * (0.96 * 1.96 + 1) + 1
    close(memory["count"], [1, count, 1, 1], atol=1e-4)
    close(memory["value"], [0.5, second + (1 - second) / count, 0.5, 0.5], atol=1e-4)
    close(memory["logp"][1], -1.006)
    assert memory["mask"].any(-1).tolist() == [False, True, False, False]


def test_one_prompt_of_each_pool_is_answered_by_its_priority():
    stage = load("spo_single_stream", candidates=2, explore=0.0).rollout
    memory = stage.init(problem(prompts=4)) | {"value": jnp.array([1.0, 0.5, 0.0, 0.3])}
    for seed in range(3):
        rollouts, _ = stage.apply(memory, jax.random.key(seed), policy_at(-1.0), prompts_at(0, 1, 2, 3))
        np.testing.assert_array_equal(rollouts.prompts.index, [1, 3])
        close(rollouts.credit[:, 0, 0], [-0.5, -0.3])
    with pytest.raises(ValueError, match="candidates"):
        load("spo_single_stream", candidates=0)


def test_spo_that_expects_nothing_is_reinforce_pp():
    child = load("spo_single_stream", clip_high=0.2, bound=jnp.inf)
    assert_equal(child, load("reinforce_pp", kl=None), length=1)


# --- adora ------------------------------------------------------------------------------------------------------------

LLM, VLM = compiled(adora.right_outgrow_wrong), compiled(adora.right_outgrow_wrong_or_none)


@pytest.mark.parametrize(
    "length, right, truncated, llm, vlm",
    [
        ([100, 300, 200, 210], [1, 1, 0, 0], [0, 0, 0, 0], True, True),
        ([100, 100, 200, 210], [1, 1, 0, 0], [0, 0, 0, 0], False, False),
        ([100, 205, 200, 210], [1, 1, 0, 0], [0, 0, 0, 0], False, False),
        ([100, 100, 90, 4000], [1, 1, 0, 0], [0, 0, 0, 1], True, True),
        ([100, 100, 90, 4000], [1, 1, 0, 0], [0, 0, 0, 0], False, False),
        ([100, 100, 90, 90], [0, 0, 0, 0], [0, 0, 0, 0], False, True),
        ([100, 100, 90, 90], [0, 0, 0, 0], [1, 1, 1, 1], False, True),
        ([100, 100, 90, 90], [1, 1, 1, 1], [0, 0, 0, 0], True, False),
        ([100, 100, 90, 90], [1, 1, 0, 0], [0, 0, 1, 1], True, False),
    ],
)
def test_right_rows_that_outgrow_wrong_ones(length, right, truncated, llm, vlm):
    rows = np.array(length, np.float32), np.array(right, bool), np.array(truncated, bool)
    assert [bool(f(*rows, np.ones(4, bool))) for f in (LLM, VLM)] == [llm, vlm]
    # Rows that do not count are not looked at.
    more = [np.append(x, x.dtype.type(y)) for x, y in zip(rows, (9999.0, True, False), strict=True)]
    assert [bool(f(*more, np.arange(5) < 4)) for f in (LLM, VLM)] == [llm, vlm]


def test_adora_scales_the_advantage_and_not_the_divergence():
    """The first group's right row is the longer one, the second's is not."""
    mask = np.array([[[1, 1], [1, 0]], [[1, 0], [1, 1]]], bool)
    logp = np.where(mask, -1.0, np.nan).astype(np.float32)
    batch = toy_batch(logp=logp, mask=mask, outcome=np.array([[1.0, 0], [1, 0]]), reference=logp - 0.2)
    close(np.asarray(prepare(load("adora"), batch).weight)[..., 0], [[1, 1], [0.1, 0.1]])
    got, want = (
        evaluate(a.loss, Scores(logp=logp + 0.1), prepare(a, batch)).coefficient
        for a in (load("adora", kl=None), load("grpo", kl=None))
    )
    close(got, want * np.array([1.0, 0.1], np.float32)[:, None, None])
    with_kl, plain = load("adora", kl=0.3, shrink=0.0), load("grpo", kl=0.3)
    got = evaluate(with_kl.loss, Scores(logp=logp + 0.1), prepare(with_kl, batch))
    close(
        got.metrics["loss/kl_to_reference"],
        evaluate(plain.loss, Scores(logp=logp + 0.1), prepare(plain, batch)).metrics["loss/kl_to_reference"],
    )
    assert np.asarray(got.coefficient)[1, 0, 0] != 0


def test_adora_with_equal_weights_is_grpo():
    assert_equal(load("adora", shrink=1.0, kl=0.04), load("grpo"))
