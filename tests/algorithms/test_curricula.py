"""Methods that choose prompts and allocate rollouts: vade, pcl, the two gdro, mmr1_vas, drive."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load, mmr1_vas, pcl, prompt_gdro, rollout_gdro, vade
from jaxrl_llm.prompts.choose import highest, successes
from jaxrl_llm.prompts.difficulty import moved, unvisited, visited
from jaxrl_llm.prompts.diversity import distinct_ngrams
from jaxrl_llm.rollouts.ragged import most_probable
from jaxrl_llm.stats import first
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts
from jaxrl_llm.types import Problem, World

P = 6
KEY = jax.random.key(0)
POISON = [jnp.nan, 1e10]


def close(a, b, **tolerance):
    np.testing.assert_allclose(a, b, **({"rtol": 1e-5, "atol": 1e-6} | tolerance))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def prompts_at(index):
    return jax.tree.map(lambda x: x[jnp.array(index)], toy_prompts(P))


def problem(rows=P):
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), toy_prompts(4))
    return Problem(rows=rows, prompts=4, length=2, vocab=2 * P, params={}, example=example)


def visit(index, outcome, *, keep=None, step=0, tokens=None):
    """A batch of the prompts at `index` with these outcomes, rows of two tokens."""
    outcome = jnp.array(outcome, jnp.float32)
    batch = toy_batch(logp=jnp.zeros((*outcome.shape, 2)), outcome=outcome, keep=keep, tokens=tokens)
    rollouts = dataclasses.replace(batch.rollouts, prompts=prompts_at(index))
    return dataclasses.replace(batch, rollouts=rollouts, step=jnp.asarray(step))


def world(*, step=0, length=3):
    """Rows that are as long as they may be."""

    def sample(key, prompts, size, limit=None):
        mask = jnp.arange(length) < limit[..., None]
        rollouts = toy_batch(logp=jnp.zeros(mask.shape), mask=mask).rollouts
        return dataclasses.replace(rollouts, prompts=prompts)

    return World(sample=sample, score=None, reward=None, models={}, step=jnp.asarray(step), length=length)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_highest_keeps_the_order_drawn_and_takes_a_prompt_once_while_there_are_others():
    index = jnp.array([3, 1, 3, 0])
    same(highest(jnp.array([0.1, 0.5, 0.9, 0.3]), index, 2), [1, 3])
    same(highest(jnp.array([0.9, 0.5, 0.9, 0.3]), index, 2), [0, 1])
    same(highest(jnp.array([0.9, 0.5, 0.9, 0.3]), index, 4), [0, 1, 2, 3])
    same(highest(jnp.zeros(4), jnp.arange(4), 2), [0, 1])
    same(first(index), [True, True, False, True])
    same(first(index, jnp.array([False, True, True, True])), [True, True, True, True])


def test_successes_count_rows_that_count():
    right, rows = successes(visit([2, 5], [[1, 0, 1], [1, 1, 1]], keep=[[1, 1, 1], [1, 0, 0]]))
    same((right, rows), (jnp.array([2.0, 1.0]), jnp.array([3.0, 1.0])))


@pytest.mark.parametrize("name", ["vade", "pcl", "mmr1_vas"])
def test_the_pool_must_divide(name):
    stage = load(name).prompt
    with pytest.raises(ValueError, match="6 prompts a step do not divide by candidates=4"):
        stage.apply(stage.init(problem()), KEY, toy_prompts(P))
    with pytest.raises(ValueError, match="at least 1"):
        load(name, candidates=0)


@pytest.mark.parametrize("name, changed", [("vade", {}), ("pcl", {}), ("mmr1_vas", {"share": 0.0})])
def test_one_candidate_is_every_prompt_as_drawn(name, changed):
    stage = load(name, candidates=1, **changed).prompt
    memory = stage.observe(stage.init(problem()), visit([1, 4], [[1, 0], [0, 0]]))
    drawn = prompts_at([4, 1, 1, 5])
    same(stage.apply(memory, KEY, drawn)[0], drawn)


# --- vade -------------------------------------------------------------------------------------------------------------


def test_vade_information_prefers_prompts_solved_one_time_in_three():
    close(vade.information(jnp.array([0.1, 1 / 3, 0.5, 0.9])), [0.081, 0.148148, 0.125, 0.009])
    grid = jnp.linspace(0, 1, 301)
    close(grid[jnp.argmax(vade.information(grid))], 1 / 3, atol=1e-3)


def test_vade_without_decay_counts_trials():
    stage = load("vade", decay=1.0, visited_decay=1.0).prompt
    memory = stage.init(problem())
    for batch in [visit([1, 4], [[1, 0, 0], [1, 1, 1]]), visit([1, 2], [[1, 1, 0], [0, 0, 0]])]:
        memory = stage.observe(memory, batch)
    same(memory, {"right": jnp.array([0.0, 3, 0, 0, 3, 0]), "wrong": jnp.array([0.0, 3, 3, 0, 0, 0])})


def test_vade_forgets_all_prompts_and_faster_those_it_answered():
    stage = load("vade").prompt
    memory = {"right": jnp.full(P, 2.0), "wrong": jnp.full(P, 1.0)}
    got = stage.observe(memory, visit([1, 4], [[1, 0, 0], [1, 1, 1]], keep=[[1, 1, 1], [0, 0, 0]]))
    close(got["right"], [1.98, 2.584, 1.98, 1.98, 1.98, 1.98])
    close(got["wrong"], [0.99, 2.792, 0.99, 0.99, 0.99, 0.99])


def test_vade_takes_what_is_known_to_be_informative_and_tries_what_is_not():
    stage = load("vade").prompt
    rate = jnp.array([0.9, 0.33, 0.02, 0.6])
    known = {"right": 1e4 * rate, "wrong": 1e4 * (1 - rate)}
    chosen, _ = stage.apply(known, KEY, prompts_at([0, 1, 2, 3]))
    same((chosen.index, chosen.target), (jnp.array([1]), jnp.array([1])))
    draw = jax.vmap(lambda key: stage.apply(stage.init(problem()), key, prompts_at([0, 1, 2, 3]))[0].index[0])
    found = draw(jax.random.split(KEY, 200))
    assert (np.bincount(found, minlength=4) > 30).all()
    same(found, draw(jax.random.split(KEY, 200)))


# --- pcl --------------------------------------------------------------------------------------------------------------


def expecting(rates):
    return {"token": jnp.zeros(2 * P), "prompt": jnp.array(rates) - 0.5, "constant": jnp.array(0.5)}


def test_pcl_takes_the_prompts_nearest_to_one_half():
    memory = expecting([0.1, 0.45, 0.9, 0.55, 0, 0])
    stage = load("pcl", candidates=2).prompt
    same(stage.apply(memory, KEY, prompts_at([0, 1, 2, 3]))[0].index, [1, 3])
    same(stage.apply(memory, KEY, prompts_at([3, 2, 1, 0]))[0].index, [3, 1])
    hard = load("pcl", candidates=2, target=0.1).prompt
    same(hard.apply(memory, KEY, prompts_at([0, 1, 2, 3]))[0].index, [0, 1])


def test_pcl_with_true_pass_rates_has_the_most_variance():
    rates = np.array([0.95, 0.3, 0.05, 0.6, 0.8, 0.45], np.float32)
    chosen = load("pcl", candidates=3).prompt.apply(expecting(rates), KEY, toy_prompts(P))[0].index
    variance = rates * (1 - rates)
    close(variance[np.asarray(chosen)].mean(), np.sort(variance)[-2:].mean())


def test_pcl_value_takes_a_gradient_step_on_the_squared_error():
    stage = load("pcl").prompt
    value = stage.observe(stage.init(problem()), visit([2], [[1, 1]]))
    # The error is -1/2; the prompt's two tokens are half of it each.
    close(value["constant"], 0.65)
    close(value["prompt"], [0, 0, 0.15, 0, 0, 0])
    close(value["token"], [0, 0, 0, 0, 0.075, 0.075, 0, 0, 0, 0, 0, 0])
    drawn = toy_prompts(P)
    seen = jax.vmap(pcl.expected, (None, 0, 0))(value, drawn.context, drawn.index)
    close(seen, [0.65, 0.65, 0.875, 0.65, 0.65, 0.65])


def test_pcl_value_learns_group_means_one_prompt_after_the_other():
    stage = load("pcl").prompt
    start = stage.init(problem())
    both = stage.observe(start, visit([2, 2], [[1, 0], [1, 1]]))
    after = stage.observe(stage.observe(start, visit([2], [[1, 0]])), visit([2], [[1, 1]]))
    jax.tree.map(close, both, after)
    value = start
    for _ in range(40):
        value = stage.observe(value, visit([0, 3], [[1, 0, 0, 0], [1, 1, 1, 0]]))
    drawn = prompts_at([0, 3])
    close(jax.vmap(pcl.expected, (None, 0, 0))(value, drawn.context, drawn.index), [0.25, 0.75], atol=1e-3)


def test_pcl_reads_no_padding_of_the_prompt():
    context = dataclasses.replace(toy_prompts(P).context, mask=jnp.ones((P, 2), bool).at[:, 1].set(False))
    value = {"token": jnp.arange(12.0), "prompt": jnp.zeros(P), "constant": jnp.zeros(())}
    wild = dataclasses.replace(context, tokens=context.tokens.at[:, 1].set(10**6))
    for c in (context, wild):
        close(jax.vmap(pcl.expected, (None, 0, 0))(value, c, jnp.arange(P)), 2.0 * jnp.arange(P))


# --- mmr1_vas ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_ngrams_counts_as_sets_do(n):
    rng = np.random.default_rng(n)
    for length in (2, 7):
        tokens, mask = rng.integers(0, 3, (4, length)), rng.random((4, length)) < 0.8
        grams = [
            tuple(row[i : i + n])
            for row, keep in zip(tokens.tolist(), mask, strict=True)
            for i in range(length - n + 1)
            if keep[i : i + n].all()
        ]
        want = len(set(grams)) / max(len(grams), 1)
        close(distinct_ngrams(jnp.array(tokens), jnp.array(mask), n=n), want)
        close(distinct_ngrams(jnp.where(mask, tokens, 99), jnp.array(mask), n=n), want)


def test_mmr1_score_is_variance_and_diversity():
    batch = toy_batch(
        logp=jnp.zeros((1, 2, 5)), outcome=[[1, 0]], tokens=[[[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]]
    )  # half are right; six of ten tokens are different
    close(mmr1_vas.variance_and_diversity(batch, variance=0.8, diversity=0.2, n=1), [0.32])


def test_mmr1_weights_span_the_scores_and_unknown_prompts_are_average():
    memory = mmr1_vas.no_scores(problem())
    same(mmr1_vas.weights(memory), jnp.zeros(P))
    score = jnp.array([0.1, 0.3, 0.2, 9, 9, 9])
    memory |= {"score": score, "known": jnp.arange(P) < 3}
    close(mmr1_vas.weights(memory), [0, 1, 0.5, 0.5, 0.5, 0.5])


@pytest.mark.parametrize("share, weighted", [(0.0, 0), (0.5, 2), (0.74, 2), (0.75, 3), (1.0, 4)])
def test_mmr1_draws_a_share_by_weight(share, weighted):
    stage = load("mmr1_vas", candidates=1, share=share).prompt
    memory = stage.init(problem()) | {"score": jnp.array([0, 0, 0, 0.2, 0, 0]), "known": jnp.ones(P, bool)}
    got, _ = stage.apply(memory, KEY, prompts_at([0, 1, 2, 3]))
    same(got.index, jnp.array([3] * weighted + [0, 1, 2, 3][weighted:]))


def test_mmr1_draws_by_weight_with_replacement_and_all_alike_without_weights():
    stage = load("mmr1_vas", candidates=1, share=1.0).prompt
    score = jnp.array([0, 0.1, 0.3, 0, 0, 0])
    memory = stage.init(problem()) | {"score": score, "known": jnp.ones(P, bool)}
    draw = jax.vmap(lambda memory, key: stage.apply(memory, key, prompts_at([0, 1, 2, 3]))[0].index, (None, 0))
    keys = jax.random.split(KEY, 500)
    close(np.bincount(draw(memory, keys).ravel(), minlength=4) / 2000, [0, 0.25, 0.75, 0], atol=0.04)
    close(np.bincount(draw(stage.init(problem()), keys).ravel(), minlength=4) / 2000, [0.25] * 4, atol=0.04)


def test_mmr1_scores_are_renewed_every_so_often_by_the_mean_of_what_was_seen():
    stage = load("mmr1_vas", refresh=2, momentum=0.25, diversity=0.0, variance=1.0).prompt
    memory = stage.observe(stage.init(problem()), visit([1, 2], [[1, 0], [0, 0]], step=0))
    same(memory["score"], jnp.zeros(P))
    memory = stage.observe(memory, visit([1, 3], [[1, 1], [1, 0]], step=1, keep=[[1, 1], [0, 0]]))
    close(memory["score"], [0, 0.125, 0, 0, 0, 0])
    same(memory["known"], [False, True, True, False, False, False])
    for step in (2, 3):
        memory = stage.observe(memory, visit([1], [[1, 0]], step=step))
    close(memory["score"], [0, 0.25 * 0.125 + 0.75 * 0.25, 0, 0, 0, 0])


# --- gdro -------------------------------------------------------------------------------------------------------------


def test_bins_are_left_only_beyond_their_edges():
    at = jnp.array([4, 4, 4, 4, 4, 9, 0])
    passes, visits = jnp.array([52, 54, 38, 36, 0, 100, 0]), jnp.array([100, 100, 100, 100, 7, 100, 0])
    same(moved(at, passes, visits, bins=10, hysteresis=0.03), [4, 5, 4, 3, 0, 9, 0])
    same(moved(at, passes, visits, bins=10, hysteresis=0.0), [5, 5, 3, 3, 0, 9, 0])


def test_history_is_a_window_of_visits_that_passed():
    history = unvisited(problem(), window=3, bins=10)
    same(history["bin"], jnp.full(P, 5, jnp.int32))
    outcomes = [[1, 0], [0, 0], [1, 1], [0, 0], [0, 0]]
    estimates = [9, 5, 6, 3, 3]  # 1, 1/2, 2/3, then 1/3 of the last three, twice
    for outcome, want in zip(outcomes, estimates, strict=True):
        batch = visit([2, 3], [outcome, [1, 1]], keep=[[1, 1], [0, 0]])
        history = visited(history, batch, bins=10, hysteresis=0.0)
        assert int(history["bin"][2]) == want
    same((history["visits"], history["bin"][3]), (jnp.array([0, 0, 5, 0, 0, 0]), 5))


def test_a_prompt_that_is_there_twice_was_visited_twice():
    start = unvisited(problem(), window=3, bins=10)
    once = visited(start, visit([1, 2, 1], [[1, 0], [1, 1], [0, 0]]), bins=10, hysteresis=0.0)
    assert int(once["visits"][1]) == 2 and int(once["passed"][1].sum()) == 1 and int(once["bin"][1]) == 5
    assert int(once["visits"][2]) == 1 and int(once["bin"][2]) == 9


def test_prompt_gdro_shares_and_weights():
    score, present = jnp.array([0.224, 0.56]), jnp.ones(2, bool)
    share = prompt_gdro.bin_shares(score, present, eta=0.65, gamma=0.01)
    close(share, [0.446160, 0.553840])
    rows = jnp.ones((4, 1), bool)
    weight = prompt_gdro.row_weights(share, jnp.array([0, 0, 0, 1]), rows, cap=15.0)
    close(weight[:, 0], [0.943096, 0.943096, 0.943096, 1.170711])
    close(weight.mean(), 1.0)
    capped = prompt_gdro.row_weights(share, jnp.array([0, 0, 0, 1]), rows, cap=1.1)
    close(capped[:, 0], [0.943096, 0.943096, 0.943096, 1.1])
    alone = prompt_gdro.bin_shares(jnp.array([0.224, 9.0, 0.56]), jnp.array([1, 0, 1], bool), eta=0.65, gamma=0.01)
    close(alone, [0.446160, 0, 0.553840])


def test_prompt_gdro_shares_are_the_slope_of_the_entropic_loss():
    losses, present = jnp.array([0.2, 0.5, 1.0]), jnp.ones(3, bool)

    def entropic(x):
        return jax.nn.logsumexp(0.65 * x) / 0.65

    close(entropic(losses), 2.292760)
    close(prompt_gdro.bin_shares(losses, present, eta=0.65, gamma=0.0), jax.grad(entropic)(losses))


def test_prompt_gdro_scores_average_the_failures_of_a_bin():
    stage = load("prompt_gdro").weight
    memory = stage.init(problem())
    weight, memory = stage.apply(memory, KEY, visit([0, 1], [[0, 0, 0, 0], [1, 1, 1, 0]]))
    close(memory["score"], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0.25])
    same(memory["scored"], [True] + [False] * 8 + [True])
    omega = np.exp(0.65 * np.array([1, 0.25]))
    share = 0.99 * omega / omega.sum() + 0.005
    close(weight, np.broadcast_to((share / share.mean())[:, None], (2, 4)))
    _, memory = stage.apply(memory, KEY, visit([2], [[1, 1, 1, 1]]))
    close(memory["score"], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0.88 * 0.25])


def test_most_probable_sizes_are_the_best_that_spend_the_budget():
    rng = np.random.default_rng(0)
    sizes, count = np.array([1, 2, 4, 5]), np.array([2, 0, 3, 1])
    for budget in (8, 12, 17):
        logp = rng.normal(size=(4, 4)).astype(np.float32)
        got = np.asarray(most_probable(jnp.array(logp), jnp.array(count), jnp.array(sizes), budget=budget))
        assert (count * sizes[got]).sum() == budget
        every = np.stack(np.meshgrid(*[range(4)] * 4), -1).reshape(-1, 4)
        possible = every[(sizes[every] * count).sum(-1) == budget]
        total = logp[np.arange(4), possible].sum(-1)
        close(logp[np.arange(4), got].sum(), total.max())


def test_rollout_gdro_spends_its_budget_on_whole_groups():
    stage = load("rollout_gdro").rollout
    memory = stage.init(problem())
    bin = jnp.array([0, 3, 3, 9, 9, 9])
    memory["history"]["bin"] = bin
    seen = set()
    for key in jax.random.split(KEY, 5):
        rollouts, after = stage.apply(memory, key, world(), toy_prompts(P))
        assert rollouts.mask.shape == (P, 12, 3)
        sizes = rollouts.mask.any(-1).sum(-1)
        same(sizes, 2 + after["played"][bin])
        same(rollouts.mask.any(-1), jnp.arange(12) < sizes[:, None])
        assert int(sizes.sum()) == 4 * P and rollouts.mask.sum() == 4 * P * 3
        seen.add(tuple(sizes.tolist()))
    assert len(seen) > 1


def test_rollout_gdro_without_noise_takes_the_most_probable_sizes():
    stage = load("rollout_gdro", smallest=2, largest=6, explore=0.0).rollout
    memory = stage.init(problem())
    memory["history"]["bin"] = jnp.array([0, 0, 0, 9, 9, 9])
    memory["score"] = memory["score"].at[0, 3].set(5.0)  # groups of 5 in bin 0 leave 3 for bin 9
    rollouts, _ = stage.apply(memory, KEY, world(), toy_prompts(P))
    same(rollouts.mask.any(-1).sum(-1), jnp.array([5, 5, 5, 3, 3, 3]))
    close(rollout_gdro.probabilities(jnp.array([[0.0, 1.0]]), eta=np.log(3), gamma=0.01), [[0.2525, 0.7475]])


def test_rollout_gdro_scores_what_was_played_in_the_bins_it_was_played_in():
    stage = load("rollout_gdro").rollout
    memory = stage.init(problem()) | {"played": jnp.full(10, 1), "price": jnp.array(0.5)}
    memory["history"]["bin"] = jnp.array([0, 9, 9, 5, 5, 5])
    batch = visit([0, 1, 2], [[0, 0, 0], [1, 0, 0], [1, 1, 1]])
    got = stage.observe(memory, batch)
    # Failures 1 and 2/6; sizes of 3 where 4 is the mean; three rows a group.
    want = np.zeros((10, 11))
    want[0, 1], want[9, 1] = 1 - 0.5 * (3 - 4), 1 / 3 - 0.5 * (3 - 4)
    close(got["score"], want)
    close(got["price"], 0.5 + 0.05 * (3 - 4))
    assert int(got["history"]["bin"][0]) == 0 and int(got["history"]["visits"].sum()) == 3


def test_rollout_gdro_keeps_its_price_while_every_row_is_scored():
    stage = load("rollout_gdro").rollout
    got = stage.observe(stage.init(problem()), visit([0, 1], [[0, 0, 0, 0, 1, 1], [1, 0, 9, 9, 9, 9]],
                        keep=[[1] * 6, [1, 1, 0, 0, 0, 0]]))  # fmt: skip
    assert got["price"] == 0
    got = stage.observe(got, visit([0], [[9.0, 9.0]], keep=[[0, 0]]))
    assert got["price"] == 0


def test_rollout_gdro_sizes_must_be_in_order():
    for wrong in ({"smallest": 5}, {"largest": 3}, {"smallest": 0}):
        with pytest.raises(ValueError, match="smallest="):
            load("rollout_gdro", **wrong)


# --- drive ------------------------------------------------------------------------------------------------------------

SMALL = {"first_group_size": 2, "group_size": 3, "steps": (2, 1, 1), "keep": (4, 3, 1)}


def trained_on(memory):
    return set(np.asarray(memory["prompts"].index)[np.asarray(memory["alive"])].tolist())


def test_drive_keeps_the_hardest_and_every_phase_fewer():
    stage = load("drive", **SMALL).prompt
    memory = stage.init(problem())
    memory = stage.observe(memory, visit([0, 1, 2], [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], step=0))
    assert trained_on(memory) == {0, 1, 2}
    memory = stage.observe(memory, visit([5, 3, 4], [[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]], step=1))
    assert trained_on(memory) == {1, 2, 3, 5}
    phases = [trained_on(memory)]
    # Solved now: the hardest of before is the easiest of after; of equals those with the lower index stay.
    for step in (2, 3, 4):
        memory = stage.observe(memory, visit([2, 2, 1], [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]], step=step))
        phases.append(trained_on(memory))
    assert phases == [{1, 2, 3, 5}, {1, 3, 5}, {1}, {1}]
    close(memory["rate"][memory["prompts"].index == 2], 7 / 8)


def test_drive_takes_drawn_prompts_first_and_then_survivors():
    stage = load("drive", **SMALL).prompt
    memory, drawn = stage.init(problem()), prompts_at([0, 1, 0, 2, 0])
    same(stage.apply(memory, KEY, drawn)[0], drawn)
    for step in (0, 1):
        memory = stage.observe(memory, visit([3, 4, 5], [[0, 0], [1, 1], [1, 0]], step=step))
        before = stage.apply(memory, KEY, drawn)[0]
        assert set(before.index.tolist()) == ({0, 1, 2} if step == 0 else {3, 4, 5})
    chosen = before
    assert sorted(np.bincount(chosen.index)[3:]) == [1, 2, 2]
    same(chosen, prompts_at(chosen.index))
    assert any(stage.apply(memory, key, drawn)[0].index[0] != chosen.index[0] for key in jax.random.split(KEY, 9))


def test_drive_with_nothing_measured_goes_on_with_drawn_prompts():
    stage = load("drive", **SMALL).prompt
    memory, drawn = stage.init(problem()), prompts_at([0, 1, 0, 2])
    for step in (0, 1):
        memory = stage.observe(memory, visit([3], [[1, 1]], keep=[[0, 0]], step=step))
    same(stage.apply(memory, KEY, drawn)[0], drawn)


def test_drive_pool_takes_no_new_prompts_after_the_first_stage():
    stage = load("drive", **SMALL).prompt
    memory = stage.observe(stage.init(problem()), visit([3, 4], [[1, 1], [1, 0]], step=1))
    memory = stage.observe(memory, visit([0], [[0, 0]], step=2))
    assert trained_on(memory) == {3, 4}


@pytest.mark.parametrize("step, rows", [(0, 2), (1, 2), (2, 3), (9, 3)])
def test_drive_groups_grow_with_the_second_stage(step, rows):
    rollouts = load("drive", **SMALL).rollout(world(step=step), KEY, toy_prompts(2))
    assert rollouts.mask.shape == (2, 3, 3)
    same(rollouts.mask.any(-1), jnp.broadcast_to(jnp.arange(3) < rows, (2, 3)))


@pytest.mark.parametrize("wrong", [{"steps": (1, 2)}, {"keep": (3, 4, 5)}, {"keep": (3, 2, 0)}])
def test_drive_phases_must_fit(wrong):
    with pytest.raises(ValueError, match="as many `steps` as phases"):
        load("drive", **(SMALL | wrong))


# --- all --------------------------------------------------------------------------------------------------------------

REMEMBER = {
    "vade": lambda a, m, b: a.prompt.observe(m, b),
    "pcl": lambda a, m, b: a.prompt.observe(m, b),
    "mmr1_vas": lambda a, m, b: a.prompt.observe(m, b),
    "drive": lambda a, m, b: a.prompt.observe(m, b),
    "prompt_gdro": lambda a, m, b: a.weight.apply(m, KEY, b),
    "rollout_gdro": lambda a, m, b: a.rollout.observe(m, b),
}


def stage_of(algorithm):
    return next(s for s in (algorithm.prompt, algorithm.weight, algorithm.rollout) if hasattr(s, "observe"))


@pytest.mark.parametrize("fill", POISON)
@pytest.mark.parametrize("name", REMEMBER)
def test_rows_that_do_not_count_never_reach_memory(name, fill):
    algorithm = load(name, **({"refresh": 1} if name == "mmr1_vas" else {}))
    keep = [[1, 0, 1], [0, 0, 0], [1, 1, 1]]
    outcome, rest = jnp.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]), jnp.array(keep, bool)
    tokens = jnp.arange(18).reshape(3, 3, 2)
    other = jnp.where(rest[..., None], tokens, 7)
    memory = stage_of(algorithm).init(problem())
    clean = REMEMBER[name](algorithm, memory, visit([1, 2, 4], outcome, keep=keep, tokens=tokens))
    poisoned = visit([1, 2, 4], jnp.where(rest, outcome, fill), keep=keep, tokens=other)
    same(clean, REMEMBER[name](algorithm, memory, poisoned))
    assert any(
        (a != b).any()
        for a, b in zip(jax.tree.leaves(memory), jax.tree.leaves(clean)[-len(jax.tree.leaves(memory)) :], strict=True)
    )


LIMITS = {
    "vade": (load("vade", candidates=1), load("grpo")),
    "pcl": (load("pcl", candidates=1), dataclasses.replace(load("grpo", kl=None), advantage=load("dr_grpo").advantage)),
    "mmr1_vas": (load("mmr1_vas", candidates=1, share=0.0), load("grpo", kl=0.01)),
    "drive": (load("drive"), load("grpo")),
    "prompt_gdro": (load("prompt_gdro", eta=0.0, clip_high=0.2), load("grpo", kl=1e-3)),
    "rollout_gdro": (load("rollout_gdro", smallest=4, largest=4, clip_high=0.2, kl=None), load("grpo", kl=None)),
}


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / batch.mask.sum()


def mixed_batch():
    """One group fails altogether."""
    scores, batch = random_batch(jax.random.key(11))
    return scores, dataclasses.replace(batch, outcome=batch.outcome.at[0].set(0.0))


@pytest.mark.parametrize("name", LIMITS)
def test_limit_in_value_and_gradient(name):
    (value, gradient), (want, want_gradient) = (run(a, *mixed_batch()) for a in LIMITS[name])
    close(value, want)
    close(gradient, want_gradient)
    assert (gradient != 0).any()


def test_limits_can_fail():
    for name, changed in (("prompt_gdro", {"eta": 0.65}), ("prompt_gdro", {"clip_high": 0.05}), ("pcl", {})):
        got, want = run(load(name, **changed), *mixed_batch())[1], run(load("grpo"), *mixed_batch())[1]
        assert not np.allclose(got, want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["rollout_gdro", "drive"])
def test_rows_that_were_not_drawn_change_nothing(name):
    """A padded group is the smaller group, in value and gradient."""
    scores, batch = random_batch(jax.random.key(3), size=5)
    mask = batch.rollouts.mask.at[:, 3:].set(False)
    rollouts = dataclasses.replace(batch.rollouts, mask=mask)
    padded = dataclasses.replace(batch, rollouts=rollouts, keep=batch.keep & mask.any(-1))

    def narrow(x):
        return x[:, :3] if jnp.ndim(x) >= 2 and x.shape[:2] == (3, 5) else x

    value, gradient = run(load(name), scores, padded)
    want, want_gradient = run(load(name), *jax.tree.map(narrow, (scores, batch)))
    close(value, want)
    close(gradient[:, :3], want_gradient)
    assert (want_gradient != 0).any() and not gradient[:, 3:].any()
