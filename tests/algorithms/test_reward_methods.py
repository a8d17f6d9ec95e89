"""Methods that choose rows or shape their reward: d3s, pf_ppo, dagrpo, mo_grpo_safe, hbpo, hapo_history, fapo."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithms import d3s, dagrpo, fapo, hapo_history, hbpo, load, pf_ppo
from jaxrl_llm.filters.basic import everything
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.combine import weighted_sum
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts
from jaxrl_llm.types import INJECTED, PADDING, Logged, Problem, Scores, World

KEY = jax.random.key(0)
POISON = [jnp.nan, 1e10]


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-5, "atol": 1e-5} | tolerance))


def same(a, b):
    np.testing.assert_array_equal(a, b)


def assert_equal(child, parent, seed=4, **batch):
    """Both losses have the same value and the same gradient, which is not 0."""
    scores, batch = random_batch(jax.random.key(seed), **batch)
    got, want = (evaluate(a.loss, scores, prepare(a, batch)) for a in (child, parent))
    close(got.value, want.value)
    close(got.coefficient, want.coefficient)
    assert (got.coefficient != 0).any()


def with_loss(algorithm, **changed):
    return dataclasses.replace(algorithm, loss=dataclasses.replace(algorithm.loss, **changed))


def rows(outcome, length=1, **fields):
    outcome = jnp.asarray(outcome, jnp.float32)
    return toy_batch(logp=jnp.zeros((*outcome.shape, length)), outcome=outcome, **fields)


# --- d3s --------------------------------------------------------------------------------------------------------------

MIXED = jnp.array([[1.0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def test_pairs_of_groups_and_then_the_pool():
    everyone = jnp.ones(4, bool)
    credit = jax.vmap(lambda r: center_scale(r, everyone, ddof=0))(MIXED)
    within = jax.vmap(lambda a: d3s.widest(a, everyone, 2))(credit)
    same(within.sum(-1), 2)
    close(jnp.var(credit, axis=-1, where=within), [1.333327, 1.333327, 0.999996, 0])
    chosen = d3s.widest(credit.ravel(), within.ravel(), 4)
    close(jnp.sort(credit.ravel()[chosen]), [-1.732047, -0.999998, 0.999998, 1.732047])
    close(jnp.var(credit.ravel()[chosen]), 1.999991)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_widest_rows_are_those_of_all_subsets(size):
    credit = np.array(jax.random.normal(jax.random.key(size), (9,))) ** 3
    credit[[2, 7]] = 1e10
    keep = np.ones(9, bool)
    keep[[2, 7]] = False
    chosen = np.array(d3s.widest(jnp.array(credit), jnp.array(keep), size))
    assert chosen.sum() == size and not chosen[[2, 7]].any()
    best = max(np.var(credit[list(s)]) for s in itertools.combinations(np.flatnonzero(keep), size))
    close(np.var(credit[chosen]), best)
    order = np.argsort(credit[keep])
    assert np.abs(np.diff(chosen[keep][order].astype(int))).sum() <= 2  # a prefix and a suffix


def test_more_rows_than_there_are_and_none():
    credit, keep = jnp.array([1.0, 2.0, jnp.nan, -1.0]), jnp.array([1, 1, 0, 1], bool)
    same(d3s.widest(credit, keep, 9), keep)
    assert not d3s.widest(credit, keep, 0).any() and not d3s.widest(credit, ~keep & False, 2).any()
    same(d3s.widest(jnp.zeros(4), jnp.ones(4, bool), 2).sum(), 2)


def test_rows_without_variance_are_the_last_to_survive():
    batch = prepare(load("grpo"), rows(MIXED))
    chosen = d3s.rows_with_variance(batch, each=4, start=0.75, end=0.75, steps=1)
    same(chosen, MIXED.any(-1, keepdims=True) & jnp.ones((4, 4), bool))
    chosen = d3s.rows_with_variance(batch, each=2, start=0.25, end=0.25, steps=1)
    assert chosen.sum() == 4 and not chosen[3].any()


@pytest.mark.parametrize("poison", [0.0, *POISON])
def test_tokens_are_chosen_by_advantage_and_entropy(poison):
    batch = rows([[1.0, 0.0]], 5, mask=[[[1, 1, 1, 1, 0], [0] * 5]], advantage=[[1.7, poison]])
    entropy = jnp.array([[[0.1, 1.2, 0.5, 2.0, poison], [poison] * 5]])
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, entropy=entropy))
    choose = partial(d3s.tokens_with_entropy, batch, steps=1)
    same(choose(start=0.5, end=0.5)[0, 0], [0, 1, 0, 1, 0])
    same(choose(start=1.0, end=1.0), batch.mask)
    same(choose(start=0.0, end=0.0)[0, 0], [0, 0, 0, 1, 0])


def test_the_schedule_is_linear_and_stops():
    batch = rows([[1.0, 0.0]])
    at = [d3s.during(dataclasses.replace(batch, step=jnp.array(s)), 0.2, 1.0, 10) for s in (0, 5, 10, 99)]
    close(jnp.array(at), [0.2, 0.6, 1.0, 1.0])


def test_only_chosen_tokens_count_and_advantages_stay_those_of_the_group():
    scores, batch = random_batch(jax.random.key(1))
    algorithm = load("d3s", group_size=4, each=2, rows_start=0.34, tokens_start=0.5)
    prepared, whole = prepare(algorithm, batch), prepare(load("grpo"), batch)
    # Of 12 rows 4 are chosen, and half of their tokens.
    chosen = d3s.rows_with_variance(whole, each=2, start=0.34, end=1.0, steps=1000)
    assert chosen.sum() == 4 and not (prepared.rows & ~chosen).any()
    same(prepared.mask.sum(), jnp.round((whole.mask & chosen[..., None]).sum() / 2))
    close(jnp.where(prepared.mask, prepared.advantage - whole.advantage, 0), 0)
    got = evaluate(with_loss(algorithm, terms=()).loss, scores, prepared)
    assert not jnp.where(prepared.mask, 0, got.coefficient).any() and (got.coefficient != 0).any()


def test_d3s_that_keeps_all_is_grpo():
    child = load("d3s", group_size=4, each=4, rows_start=1.0, rows_end=1.0, tokens_start=1.0)
    assert_equal(child, with_loss(load("grpo"), aggregate=token_mean))
    with pytest.raises(ValueError, match="each"):
        load("d3s", group_size=2, each=3)


# --- pf_ppo -----------------------------------------------------------------------------------------------------------


def test_chances():
    reward, keep = jnp.array([1.0, -2.0, 3.0, jnp.nan]), jnp.array([1, 1, 1, 0], bool)
    power = pf_ppo.power(reward, keep)
    close(power / power.sum(), [1 / 14, 4 / 14, 9 / 14, 0])
    same(pf_ppo.best_and_worst(reward, keep), [0, 1, 1, 0])
    same(pf_ppo.best_only(reward, keep), [0, 0, 1, 0])
    for size, best, other in ((5, 0.5, 0.125), (7, 0.4, 0.1)):
        chance = pf_ppo.best_and_random(jnp.arange(float(size)), jnp.ones(size, bool))
        close(chance / chance.sum(), [*[other] * (size - 1), best])


@pytest.mark.parametrize("reward", [0.0, 2.0, -1e30])
def test_equal_rewards_have_equal_chances(reward):
    for chances in (pf_ppo.power, pf_ppo.best_and_worst, pf_ppo.best_and_random, pf_ppo.best_only):
        got = chances(jnp.full(4, reward), jnp.arange(4) < 3)
        same(got[:3], got[0])
        assert got[0] > 0 and got[3] == 0


def test_rows_are_drawn_by_their_chances_and_as_many_as_there_were():
    reward = jnp.tile(jnp.array([1.0, -2.0, 3.0, 5.0]), 1000)[None]
    keep = reward < 4
    drawn = pf_ppo.drawn_rows(KEY, pf_ppo.power(reward[0], keep[0])[None], keep)
    same(jnp.where(keep, 0, drawn), jnp.where(keep, 0, jnp.arange(4000)))
    values = jnp.where(keep, jnp.take_along_axis(reward, drawn, 1), jnp.nan)
    close([(values == v).sum() / 3000 for v in (1.0, -2.0, 3.0, 5.0)], [1 / 14, 4 / 14, 9 / 14, 0], atol=0.03)


def drawn_again(algorithm, batch, **changed):
    """What the passes of `pf_ppo` see."""
    update = partial(algorithm.update, then=lambda key, models, batch, learn: (batch, {}), **changed)
    return update(KEY, None, batch, None)[0]


@pytest.mark.parametrize("poison", POISON)
def test_all_that_is_known_of_a_row_goes_with_it(poison):
    _, batch = random_batch(jax.random.key(3), fill=poison)
    algorithm = load("pf_ppo", group_size=4, kl=None, chances=pf_ppo.best_only)
    before = prepare(algorithm, batch)
    after = drawn_again(algorithm, before)
    # Every row that counts is now one of those with the prompt's highest reward.
    same(after.rows, before.rows)
    best = jnp.max(before.outcome, axis=-1, where=before.rows, initial=-jnp.inf)
    same(jnp.where(after.rows, after.outcome - best[:, None], 0), 0)
    for get in (
        lambda b: b.rollouts.tokens,
        lambda b: b.rollouts.logp,
        lambda b: b.advantage,
        lambda b: b.value,
        lambda b: b.old.logp,
    ):
        x, y = get(before), get(after)
        match = jnp.isclose(y[:, :, None], x[:, None], equal_nan=True).all(-1)
        match &= jnp.isclose(after.rollouts.tokens[:, :, None], before.rollouts.tokens[:, None]).all(-1)
        same(match.any(-1), True)


def test_pf_ppo_with_one_response_a_prompt_is_ppo():
    scores, batch = random_batch(jax.random.key(3))
    batch = jax.tree.map(lambda x: x[:, :1] if jnp.ndim(x) > 1 and x.shape[1] == 4 else x, batch)
    scores = jax.tree.map(lambda x: x[:, :1], scores)
    child, parent = load("pf_ppo", group_size=1, kl=None), load("ppo")
    got = evaluate(child.loss, scores, drawn_again(child, prepare(child, batch)))
    want = evaluate(parent.loss, scores, prepare(parent, batch))
    close(got.value, want.value)
    close(got.coefficient, want.coefficient)
    assert (got.coefficient != 0).any()


# --- dagrpo -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [0.5, *POISON])
@pytest.mark.parametrize(
    "quality, right, delta, want",
    [
        ([0.9, 0.88, 0.85], [1, 0, 0], 0.1, [0, 0, 0]),
        ([0.9, 0.88, 0.5], [1, 0, 0], 0.1, [1, 0, 1]),
        ([0.9, 0.5, 0.88], [1, 1, 0], 0.1, [0, 1, 1]),
        ([0.7, 0.7, 0.7], [1, 0, 1], 1e-6, [0, 0, 0]),
        ([0.9, 0.88, 0.5], [1, 0, 0], 0.0, [1, 1, 1]),
        ([0.9, 0.1, 0.5], [1, 0, 0], np.inf, [0, 0, 0]),
        ([0.9, 0.9, 0.9], [1, 1, 1], 0.1, [1, 1, 1]),
    ],
)
def test_rows_like_those_of_the_other_label_are_dropped(quality, right, delta, want, poison):
    keep = jnp.arange(4) < 3
    got = dagrpo.is_distinct(jnp.array([*quality, poison]), jnp.array([*right, 0], bool), keep, delta=delta)
    same(got[:3], jnp.array(want, bool))


def test_quality_is_the_mean_log_prob():
    batch = toy_batch(logp=jnp.log(jnp.array([[[0.5, 0.125], [0.3, jnp.nan]]])), mask=[[[1, 1], [1, 0]]])
    close(dagrpo.mean_logp(batch), jnp.log(jnp.array([[0.25, 0.3]])))


def anchored(outcome, paid, *, written=1):
    """Groups of two samples with these outcomes, and one logged response each."""
    outcome = jnp.array(outcome, jnp.float32)
    logged = Logged(
        tokens=jnp.full((len(outcome), 1, 2), 99),
        mask=jnp.full((len(outcome), 1, 2), bool(written)),
        reward=jnp.full((len(outcome), 1), paid),
    )
    prompts = dataclasses.replace(toy_prompts(len(outcome)), logged=logged)

    def sample(key, prompts, size):
        rollouts = toy_batch(logp=jnp.full((*outcome.shape, 2), -0.5)).rollouts
        return dataclasses.replace(rollouts, prompts=prompts)

    world = World(sample=sample, score=None, reward=lambda r: outcome, models={}, step=jnp.array(0), length=2)
    return dagrpo.sample_or_anchor(world, KEY, prompts, size=2)


def test_an_anchor_takes_the_first_place_where_nothing_is_right():
    got = anchored([[0, 0], [1, 0], [0, jnp.nan], [jnp.nan, jnp.nan]], 1.0)
    same(got.injected, [[1, 0], [0, 0], [1, 0], [0, 0]])
    same((got.tokens == 99).all(-1), got.injected)
    same(got.outcome, [[1, 0], [1, 0], [1, jnp.nan], [jnp.nan, jnp.nan]])
    same(got.logp[..., 0], [[0, -0.5], [-0.5, -0.5], [0, -0.5], [-0.5, -0.5]])
    same(got.generated, 4)


@pytest.mark.parametrize("paid, written", [(0.0, 1), (1.0, 0)])
def test_a_wrong_or_empty_response_is_no_anchor(paid, written):
    assert not anchored([[0, 0]], paid, written=written).injected.any()


def test_anchors_are_learnt_from_at_the_current_policy():
    """No pair with an anchor is dropped, and its ratio is 1 whatever the policy: the clip never acts on it."""
    role = [[[INJECTED, PADDING], [1, 1]]]
    batch = toy_batch(
        logp=jnp.array([[[0.0, jnp.nan], [-0.01, -0.01]]]),
        mask=[[[1, 0], [1, 1]]],
        role=role,
        outcome=jnp.array([[1.0, 0.0]]),
    )
    algorithm = load("dagrpo", kl=None)
    prepared = prepare(algorithm, batch)
    same(prepared.keep, True)
    scores = Scores(logp=jnp.array([[[-3.0, jnp.nan], [-0.01, -0.01]]]))
    got = evaluate(algorithm.loss, scores, prepared).coefficient
    # Two rows of one and two tokens: shares 1/2 and 1/4 of three tokens.
    close(got, [[[-1.5 * prepared.advantage[0, 0, 0], 0], [*-0.75 * prepared.advantage[0, 1]]]])


def test_statistics_are_those_of_the_rows_that_are_left():
    logp = jnp.log(jnp.array([[[0.9], [0.88], [0.5], [0.85]]]))
    batch = toy_batch(logp=logp, outcome=jnp.array([[1.0, 0, 0, 1]]))
    got = prepare(load("dagrpo", delta=0.55), batch)
    same(got.keep, [[1, 0, 1, 0]])
    close(got.advantage[0, :, 0], center_scale(jnp.array([1.0, 0, 0, 0]), got.keep[0]))


def test_dagrpo_without_delta_is_grpo():
    assert_equal(load("dagrpo", delta=0.0, rollout=sample_group), load("grpo"))


# --- mo_grpo_safe -----------------------------------------------------------------------------------------------------


def objectives(scores, weights, **kwargs):
    """`mo_grpo_safe` with given scores `[K B G]`."""
    rewards = tuple(partial(lambda batch, x: x, x=jnp.array(s, jnp.float32)) for s in scores)
    return load("mo_grpo_safe", reward=partial(weighted_sum, rewards=rewards, weights=weights), **kwargs)


def advantage(algorithm, batch):
    return prepare(algorithm, batch).advantage[..., 0]


def test_objectives_in_conflict_cancel_and_scale_does_not_matter():
    batch = rows([[0, 0]])
    same(advantage(objectives([[[1, 0]], [[0, 1]]], (0.5, 0.5)), batch), 0)
    got = advantage(objectives([[[1, 0]], [[0, 0.1]]], (0.5, 0.5)), batch)
    close(got, [[0.707105, -0.707105]])
    close(advantage(objectives([[[1, 0]], [[0, 0.1]]], (5.0, 5.0)), batch), got)


@pytest.mark.parametrize("poison", POISON)
def test_scores_of_rows_that_do_not_count_are_not_read(poison):
    batch = rows([[0, 0, 0]], keep=[[1, 1, 0]])
    got = prepare(objectives([[[1, 0, poison]], [[0, 3, 1]]], (1.0, 0.5)), batch)
    close(got.reward, [[1, 1.5, 0]])
    close(got.advantage[..., 0], [[-0.707104, 0.707104, 0]])


def test_mo_grpo_safe_with_one_objective_is_grpo():
    assert_equal(load("mo_grpo_safe", reward=partial(weighted_sum, rewards=(verified,), weights=(1.0,))), load("grpo"))
    with pytest.raises(ValueError, match="weight for each"):
        advantage(objectives([[[1, 0]]], (0.5, 0.5)), rows([[0, 0]]))


# --- hbpo -------------------------------------------------------------------------------------------------------------

BUDGET = {"longest": 4096, "beta": 4.0}


def test_what_a_budget_is_paid():
    got = hbpo.at_budget(jnp.array([512.0, 1024, 2048, 2560]), **BUDGET)
    close(got, [3.923141, 3.695518, 2.828427, 2.222281])


def test_rewards_within_and_beyond_the_budget():
    length = jnp.array([[300, 1024, 2048, 4097, 2000, 3000, 4096, 100]])
    batch = rows([[1, 1, 1, 1, 1, 1, 1, 0]], 4100, mask=jnp.arange(4100) < length[..., None])
    got = hbpo.within_budget(batch, budgets=(512, 2560), **BUDGET)
    close(got, [[3.923141, 3.570518, 2.453427, 0, 2.222281, 1.524755, -0.375, 0]])
    at = rows([[1, 1]], 520, mask=jnp.arange(520) < jnp.array([[[512], [513]]]))
    close(jnp.diff(hbpo.within_budget(at, budgets=(512,), **BUDGET)), 0, atol=2e-3)


def test_credit_between_budgets_and_within_the_group():
    could = [3.923141, 2.222281]
    reward = jnp.array([could[0], 0.0, could[1], could[1]])
    got = hbpo.between_and_within(reward, jnp.ones(4, bool), budgets=(512, 2560), **BUDGET)
    close(got - center_scale(reward, jnp.ones(4, bool)), [-could[0] / 2, -could[0] / 2, 0, 0])
    # A row that does not count is no part of its budget's mean.
    keep, poisoned = jnp.array([1, 0, 1, 1], bool), reward.at[1].set(jnp.nan)
    got = hbpo.between_and_within(poisoned, keep, budgets=(512, 2560), **BUDGET)
    close(jnp.where(keep, got - center_scale(poisoned, keep), 0), 0)


def test_every_budget_has_its_rows_and_its_sentence():
    seen = []

    def sample(key, prompts, size, context=None):
        seen.append((size, context))

    world = World(sample=sample, score=None, reward=None, models={}, step=None, length=2)
    hbpo.sample_budgets(world, KEY, toy_prompts(2), each=3, budgets=(4, 8), sentences=((50,), (60, 61)))
    hbpo.sample_budgets(world, KEY, toy_prompts(2), each=3, budgets=(4, 8), sentences=())
    (size, context), (_, none) = seen
    assert size == 6 and none is None
    same(context.tokens, [[[0, 1, 50, 0], [0, 1, 60, 61]], [[2, 3, 50, 0], [2, 3, 60, 61]]])
    same(context.mask, [[[1, 1, 1, 0], [1, 1, 1, 1]]] * 2)
    same(hbpo.of_rows(6, (4, 8)), [4, 4, 4, 8, 8, 8])
    with pytest.raises(ValueError, match="sentence"):
        load("hbpo", sentences=((1,),))


def shifted(reward, keep, paid):
    return paid * (jnp.mean(reward, where=keep) - 1) + center_scale(paid * reward, keep)


def test_hbpo_with_one_budget_that_nobody_exceeds_is_grpo_with_a_constant():
    parent = with_loss(load("grpo", kl=None), surrogate=partial(clip_min, low=0.2, high=0.28), aggregate=token_mean)
    paid = hbpo.at_budget(jnp.array(5.0), longest=8, beta=4.0)
    parent = dataclasses.replace(parent, advantage=partial(per_group, partial(shifted, paid=paid)))
    assert_equal(load("hbpo", each=4, budgets=(5,), longest=8), parent)


# --- hapo_history -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, right, wrong",
    [
        (hapo_history.cosine, [1, 0.707107, 0, -0.7, -0.7, -0.7], [0, 0, 0, -0.707107, -1, -1]),
        (hapo_history.linear, [1, 0.5, 0, -0.4, -0.7, -0.7], [0, 0, 0, -0.4, -0.9, -1]),
    ],
)
def test_length_against_the_history(shape, right, wrong):
    length, past = jnp.array([0.0, 50, 100, 150, 200, 400]), jnp.array(100.0)
    close(shape(length, past, jnp.array(True)), right, atol=1e-4)
    close(shape(length, past, jnp.array(False)), wrong, atol=1e-4)
    close(hapo_history.linear(jnp.array(108.0), past, jnp.array([True, False])), 0)


def visit(index, outcome, length, keep=None):
    """A batch of the prompts at `index` with these outcomes and lengths `[B G]`."""
    mask = jnp.arange(9) < jnp.array(length)[..., None]
    batch = rows(outcome, 9, mask=mask, keep=keep)
    prompts = jax.tree.map(lambda x: x[jnp.array(index)], toy_prompts(4))
    return dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, prompts=prompts))


def stage_of(**kwargs):
    stage = load("hapo_history", **kwargs).reward
    return stage, stage.init(Problem(rows=4, prompts=2, length=9, vocab=1, params={}))


def test_the_shortest_right_response_is_remembered_after_the_rewards():
    stage, memory = stage_of()
    # Prompt 1 stands in the batch twice; its shortest right row of all does not count.
    batch = visit((1, 1), [[1, 1, 0], [1, 0, jnp.nan]], [[6, 4, 1], [5, 2, 1]], keep=[[1, 1, 1], [1, 1, 0]])
    batch = dataclasses.replace(batch, outcome=jnp.nan_to_num(batch.outcome, nan=1.0))
    first, memory = stage.apply(memory, KEY, batch)
    close(jnp.where(batch.keep, first - batch.outcome, 0), 0)
    memory = stage.observe(memory, batch)
    close(memory["length"], [0, 4, 0, 0])
    close(memory["count"], [0, 3, 0, 0])
    again = visit((1, 2), [[1, 0, 1], [1, 0, 0]], [[2, 8, 6], [3, 3, 9]])
    reward, memory = stage.apply(memory, KEY, again)
    close(reward, [[1.707107, -1, 0.3], [1, 0, 0]], atol=1e-4)
    memory = stage.observe(memory, again)
    close(memory["length"], [0, 2, 3, 0])
    close(stage.observe(memory, visit((1, 2), [[1, 1, 0]] * 2, [[7, 8, 1]] * 2))["length"], [0, 2, 3, 0])


def test_the_mean_of_right_responses_is_remembered():
    stage, memory = stage_of(remember=hapo_history.average)
    memory = stage.observe(memory, visit((1, 1), [[1, 1, 0], [1, 0, 0]], [[6, 4, 1], [5, 2, 1]]))
    memory = stage.observe(memory, visit((1, 3), [[1, 0, 0], [0, 0, 0]], [[9, 4, 1], [5, 2, 1]]))
    close(memory["length"], [0, 6, 0, 0])
    close(memory["count"], [0, 4, 0, 0])


def test_hapo_without_weight_or_history_is_grpo():
    assert_equal(load("hapo_history"), load("grpo"))  # nothing is remembered yet
    stage, memory = stage_of(weight=0.0)
    batch = visit((1, 2), [[1, 0], [1, 1]], [[2, 8], [3, 9]])
    reward, _ = stage.apply(stage.observe(memory, batch), KEY, batch)
    close(reward, batch.outcome)


def test_any_right_response_is_paid_more_than_any_wrong_one():
    length = jnp.linspace(0.1, 500, 99)
    for shape in (hapo_history.cosine, hapo_history.linear):
        assert 1 + shape(length, jnp.array(7.0), jnp.array(True)).min() >= 0.3 - 1e-6
        assert shape(length, jnp.array(7.0), jnp.array(False)).max() <= 0


# --- fapo -------------------------------------------------------------------------------------------------------------


def flawed_at(*flawed):
    return lambda batch: jnp.array([flawed], bool)


def test_flawed_answers_are_paid_less():
    algorithm = load("fapo", flawed=flawed_at(0, 1, 0, 1), limit=100)
    got = prepare(algorithm, rows([[1, 1, 1, 0]]))
    close(got.reward, [[1, 0, 1, -1]])
    close(got.advantage[0, :, 0], [0.783349, -0.261116, 0.783349, -1.305581])
    half = prepare(load("fapo", flawed=flawed_at(0, 1, 0, 1), limit=100, penalty=0.5), rows([[1, 1, 1, 0]]))
    close(half.reward, [[1, 0.5, 1, -1]])


@pytest.mark.parametrize("sound, flawed, wrong, sign", [(5, 5, 10, 1), (8, 4, 8, 0), (10, 5, 5, -1)])
def test_flawed_answers_change_sides_when_sound_ones_outnumber_wrong_ones(sound, flawed, wrong, sign):
    size = sound + flawed + wrong
    outcome = jnp.arange(size)[None] < sound + flawed
    is_flawed = (jnp.arange(size) >= sound) & (jnp.arange(size) < sound + flawed)
    batch = rows(outcome)
    reward = fapo.less_if_flawed(batch, flawed=lambda batch: is_flawed, penalty=1.0)
    close(-reward.mean(), (wrong - sound) / size)
    got = prepare(load("fapo", flawed=lambda batch: is_flawed[None], limit=100), batch)
    same(jnp.sign(jnp.round(got.advantage[0, sound, 0], 5)), sign)


def test_the_reward_of_the_verifier():
    reward = partial(fapo.error_position, steps=jnp.array(10))
    close(reward(jnp.array([3, 1, 9, -1]), jnp.array(3)), [1, 0.8, 0.4, -1])
    close(reward(jnp.array([-1, 2]), jnp.array(-1)), [1, -1])


def test_fapo_without_flaws_or_penalty_is_dapo_without_dynamic_sampling():
    parent = dataclasses.replace(load("dapo"), filter=everything)
    assert_equal(load("fapo"), parent)
    assert_equal(load("fapo", penalty=0.0, flawed=lambda batch: jnp.ones(batch.outcome.shape, bool)), parent)
