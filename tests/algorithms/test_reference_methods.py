"""Methods that hold the policy to something: averaged, cloned or renewed references, running rewards or entropies."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.advantages.gae import gae
from jaxrl_llm.algorithm import chain, numbers
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.epo_agents import phase
from jaxrl_llm.algorithms.remix import centers, clip_around, convex_kl, reused, share_of_base
from jaxrl_llm.losses.band import hinge, no_history, outside, remember, turns_of, with_history
from jaxrl_llm.losses.kl import k2
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.running import clipped, combined, running_standard
from jaxrl_llm.rollouts.recent import sample_or_recall
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts, whole_step, with_fresh_loss
from jaxrl_llm.types import INJECTED, POLICY, Problem, Scores, World
from jaxrl_llm.updates.optimizer import adamw
from jaxrl_llm.updates.previous import previous, with_previous
from jaxrl_llm.updates.restart import restarting, without_history
from jaxrl_llm.updates.soup import averaged, soup_first

KEY = jax.random.key(0)


def at(step):
    _, batch = random_batch(KEY)
    return dataclasses.replace(batch, step=jnp.asarray(step))


def step_by_one(models, batch, loss=None):
    """Adds 1 to the policy and its state."""
    params, states = models
    return ({**params, "policy": params["policy"] + 1}, {"policy": states["policy"] + 1}), {"loss": jnp.zeros(())}


def run(algorithm, scores, batch):
    algorithm = with_fresh_loss(algorithm, batch)
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / jnp.maximum(batch.mask.sum(), 1)


def assert_equal_runs(a, b):
    np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-4, atol=1e-7)
    assert (a[1] != 0).any()


# --- SALSA ------------------------------------------------------------------------------------------------------------


def test_the_average_is_of_each_leaf():
    first, second = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}, {"a": jnp.array([5.0, 0.0]), "b": jnp.array(1.0)}
    got = averaged(first, second, share=0.5)
    np.testing.assert_allclose(got["a"], [3, 1])
    np.testing.assert_allclose(got["b"], 2)
    np.testing.assert_allclose(averaged(first, second, share=0.25)["a"], [4, 0.5])
    for share, want in ((1.0, first), (0.0, second)):
        jax.tree.map(np.testing.assert_array_equal, averaged(first, second, share=share), want)
    jax.tree.map(np.testing.assert_array_equal, averaged(first, first, share=0.5), first)


def test_the_average_is_computed_in_float32():
    """In bfloat16 `0.3 * 100 + 0.7 * 9` is 36.5; rounded once, 36.25."""
    one, other = jnp.array(100.0, jnp.bfloat16), jnp.array(9.0, jnp.bfloat16)
    got = averaged(one, other, share=0.3)
    assert got.dtype == jnp.bfloat16 and got == 36.25


def test_the_first_step_makes_the_soup_and_nothing_else():
    models = ({"policy": jnp.array(1.0), "reference": jnp.array(3.0)}, {"policy": jnp.array(0)})
    (params, states), _ = soup_first(KEY, models, at(0), step_by_one, share=0.5)
    assert (params["policy"], params["reference"], states["policy"]) == (1, 2, 0)
    (params, states), _ = soup_first(KEY, (params, states), at(1), step_by_one, share=0.5)
    assert (params["policy"], params["reference"], states["policy"]) == (2, 2, 1)


def test_soup_needs_a_reference():
    with pytest.raises(ValueError, match="reads none"):
        soup_first(KEY, ({"policy": jnp.array(1.0)}, {}), at(0), step_by_one)


def test_salsa_is_ppo_with_another_reference():
    scores, batch = random_batch(jax.random.key(1))
    assert_equal_runs(run(load("salsa", kl=0.1), scores, batch), run(load("ppo", kl=0.1), scores, batch))
    assert not np.allclose(run(load("salsa"), scores, batch)[1], run(load("ppo"), scores, batch)[1])
    assert numbers(load("salsa", share=0.25))["update.share"] == 0.25


# --- demonstration-regularised RL -------------------------------------------------------------------------------------


def test_the_clone_becomes_the_reference_and_the_optimiser_begins_anew():
    optimizer = adamw(0.5)
    start = {"w": jnp.array([1.0, 2.0])}
    state = optimizer.init(start)
    used = optimizer.update({"w": jnp.array([1.0, -1.0])}, state, start)[1]
    models = ({"policy": start, "reference": {"w": jnp.zeros(2)}}, {"policy": used})

    def stay(models, batch):
        return (models, {})

    for step, switched in ((3, False), (4, True), (5, False)):
        (params, states), _ = restarting(KEY, models, at(step), stay, step=5)
        np.testing.assert_array_equal(params["reference"]["w"], start["w"] if switched else [0, 0])
        want = state if switched else used
        jax.tree.map(np.testing.assert_array_equal, states["policy"], jax.tree.map(jnp.asarray, want))
    assert jax.tree.structure(without_history(used)) == jax.tree.structure(used)
    np.testing.assert_allclose(without_history(used).hyperparams["learning_rate"], 0.5)
    assert optax.tree.norm(used.inner_state) > 0


def test_nothing_restarts_at_step_0():
    models = ({"policy": jnp.array(1.0), "reference": jnp.array(3.0)}, {"policy": jnp.array(0)})
    (params, _), _ = restarting(KEY, models, at(0), step_by_one, step=0)
    assert (params["policy"], params["reference"]) == (2, 3)


def test_at_the_optimum_no_action_has_an_advantage():
    """`pi* ~ pi_BC exp(r / kl)`: `r - kl log(pi* / pi_BC)` is the same for all actions, the value of the problem."""
    clone, reward, kl = np.array([0.7, 0.2, 0.1]), np.array([0.0, 1.0, 0.5]), 0.5
    best = clone * np.exp(reward / kl)
    best /= best.sum()
    np.testing.assert_allclose(best, [0.285756, 0.603277, 0.110967], atol=1e-6)
    batch = toy_batch(
        logp=np.log(best)[None, :, None],
        reference=np.log(clone)[None, :, None],
        outcome=reward[None],
        keep=np.ones((1, 3), bool),
    )
    got = prepare(load("demo_reg", kl=kl), batch)
    np.testing.assert_allclose(got.reward, 0.447970, rtol=1e-5)
    np.testing.assert_allclose(got.advantage, 0, atol=1e-6)
    away = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, logp=batch.reference.logp))
    assert np.abs(prepare(load("demo_reg", kl=kl), away).advantage).max() > 0.1


def test_demo_reg_without_cloning_is_rloo():
    scores, batch = random_batch(jax.random.key(1))
    assert_equal_runs(run(load("demo_reg", kl=0.3), scores, batch), run(load("rloo", kl=0.3), scores, batch))


def test_demo_reg_clones_by_likelihood():
    """Rows of the data alone, as in the first phase: their reward plays no part."""
    scores, batch = random_batch(jax.random.key(1))
    role = jnp.where(batch.rollouts.mask, INJECTED, batch.rollouts.role).astype(jnp.int8)
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, role=role))
    assert_equal_runs(run(load("demo_reg"), scores, batch), run(load("sft"), scores, batch))


def test_demo_reg_refuses_a_negative_phase():
    with pytest.raises(ValueError, match="0 or more"):
        load("demo_reg", cloning_steps=-1)


# --- PPO-max ----------------------------------------------------------------------------------------------------------


def rewarded(rewards, step=0):
    rewards = jnp.asarray(rewards, jnp.float32)[None]
    shape = (*rewards.shape, 2)
    return toy_batch(logp=jnp.zeros(shape), outcome=rewards, keep=jnp.ones(rewards.shape, bool), reward=rewards)


def test_rewards_are_clipped_after_they_are_normalised():
    """Mean 4, unbiased std 4.082483; 10 is 1.47 deviations above."""
    stage = chain(verified, running_standard(), partial(clipped, bound=1.0))
    algorithm = dataclasses.replace(load("ppo_max", kl=None), reward=stage, advantage=gae)
    batch = dataclasses.replace(rewarded([1, 2, 3, 10]), value=jnp.zeros((1, 4, 2)))
    got = prepare(algorithm, batch)
    np.testing.assert_allclose(got.reward, [[-0.734847, -0.489898, -0.244949, 1]], rtol=1e-5)
    np.testing.assert_allclose(got.token_reward[0, :, 0], 0)
    default = prepare(load("ppo_max", kl=None, reward_clip=1.0), batch)
    np.testing.assert_array_equal(default.token_reward, got.token_reward)


def test_moments_run_over_steps():
    stage = running_standard()
    memory, seen = stage.init(None), []
    for rewards in ([1.0, 2.0], [3.0, 10.0], [-4.0, 0.5]):
        seen += rewards
        got, memory = stage.apply(memory, KEY, rewarded(rewards))
        np.testing.assert_allclose(memory["mean"], np.mean(seen), rtol=1e-5)
        np.testing.assert_allclose(memory["var"], np.var(seen), rtol=1e-5)
        np.testing.assert_allclose(got[0], (np.array(rewards) - np.mean(seen)) / np.std(seen, ddof=1), rtol=1e-4)


def test_moments_ignore_rows_that_do_not_count_and_empty_steps():
    memory = {"mean": jnp.array(2.0), "var": jnp.array(3.0), "count": jnp.array(4.0)}
    none = combined(memory, jnp.array([[jnp.nan, 1e10]]), jnp.zeros((1, 2), bool))
    jax.tree.map(np.testing.assert_array_equal, none, memory)
    one = combined(memory, jnp.array([[jnp.nan, 7.0]]), jnp.array([[False, True]]))
    np.testing.assert_allclose([one["mean"], one["count"]], [3.0, 5.0])
    np.testing.assert_allclose(one["var"], (4 * 3 + 25 * 4 / 5) / 5, rtol=1e-6)


def test_equal_rewards_are_0():
    stage = running_standard()
    memory = stage.init(None)
    for _ in range(3):
        got, memory = stage.apply(memory, KEY, rewarded([1 / 3] * 7))
        assert not got.any()


def test_ppo_max_pays_for_each_token_away_from_the_reference():
    """The normalised reward at the last token, less `kl * (l - l_ref)` at each."""
    batch = dataclasses.replace(rewarded([0, 2]), value=jnp.zeros((1, 2, 2)))
    batch = dataclasses.replace(batch, reference=Scores(logp=jnp.array([[[-0.1, 0.2], [0.3, -0.4]]])))
    got = prepare(load("ppo_max", kl=0.5), batch)
    z = 1 / np.sqrt(2)
    want = [[-0.05, -z + 0.1], [0.15, z - 0.2]]
    np.testing.assert_allclose(got.token_reward[0], want, rtol=1e-5)
    np.testing.assert_allclose(got.advantage[0, :, 1], got.token_reward[0, :, 1], rtol=1e-5)  # not whitened


def test_plain_ppo_max_is_ppo_without_whitening():
    scores, batch = random_batch(jax.random.key(1))
    child = dataclasses.replace(load("ppo_max", kl=None, critic_steps=0), reward=verified)
    parent = dataclasses.replace(load("ppo"), advantage=partial(gae, gamma=1.0, lam=0.95))
    assert_equal_runs(run(child, scores, batch), run(parent, scores, batch))
    assert not np.allclose(run(load("ppo_max", kl=None), scores, batch)[1], run(parent, scores, batch)[1])


# --- EPO --------------------------------------------------------------------------------------------------------------


def in_turns(entropy, turn, *, sampled=None, mask=None, step=0):
    """One row a list of tokens; `sampled` is the entropy at sampling time, of the history."""
    entropy, turn = jnp.asarray(entropy)[None], jnp.asarray(turn)[None]
    batch = toy_batch(logp=jnp.full(entropy.shape, -1.0), mask=mask, keep=jnp.ones(entropy.shape[:2], bool))
    sampled = entropy if sampled is None else jnp.asarray(sampled)[None]
    rollouts = dataclasses.replace(batch.rollouts, entropy=sampled, turn=turn)
    batch = dataclasses.replace(batch, rollouts=rollouts, step=jnp.asarray(step))
    return Scores(logp=batch.rollouts.logp, entropy=entropy), batch


def test_what_is_outside_of_the_band():
    entropy, history = jnp.array([0.3, 0.5, 1.2]), 0.5
    np.testing.assert_allclose(outside(entropy, 0.0 * history, 2 * history, 0.05), [0, 0, 0.05])
    np.testing.assert_allclose(outside(entropy, 0.8 * history, 2 * history, 0.05), [0.05, 0, 0.05])
    np.testing.assert_allclose(hinge(entropy, 0.8 * history, 2 * history, 0.05), [0.1, 0, 0.2], rtol=1e-5)
    slopes = [jax.grad(lambda h, f=f: f(h, 0.4, 1.0, 0.05).sum())(entropy) for f in (outside, hinge)]
    np.testing.assert_allclose(slopes, [[0, 0, 0], [-1, 0, 1]])


def test_phases_of_a_run():
    got = [phase(jnp.asarray(step), steps=200) for step in (0, 50, 100, 101, 150, 200)]
    np.testing.assert_allclose(got, [1, 0.873576, 0.827067, 0.8 * np.exp(-0.03), 0.178504, 0.039830], rtol=1e-5)


def test_history_is_a_mean_over_steps_of_each_turn_they_had():
    memory = no_history(None, turns=3)
    _, first = in_turns(
        [[0.2, 0.4, 1.0], [0.6, jnp.nan, jnp.nan]], [[0, 0, 1], [0, 2, 2]], mask=[[[1, 1, 1], [1, 0, 0]]]
    )
    _, second = in_turns([[0.8, 0.8]], [[0, 0]])
    for batch in (first, second):
        memory = remember(memory, batch)
    np.testing.assert_allclose(memory["sum"], [0.4 + 0.8, 1.0, 0], rtol=1e-6)
    np.testing.assert_array_equal(memory["steps"], [2, 1, 0])
    found = with_history(memory, None, in_turns([[0.0, 1.0]], [[0, 1]])[1])
    np.testing.assert_allclose(found["history"][0, 0], [1.2 / 3, 2.0 / 2], rtol=1e-6)  # this step's included
    assert (found["half_way"], with_history(memory, None, second)["half_way"]) == (True, False)


def test_late_turns_share_the_last_place_and_no_turns_are_one():
    _, batch = in_turns([[0.0, 0.0, 0.0]], [[1, 7, 99]])
    np.testing.assert_array_equal(turns_of(batch, 5)[0, 0], [1, 4, 4])
    without = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, turn=None))
    assert not turns_of(without, 5).any()


def test_the_bonus_and_the_penalty():
    """Mean entropy 2/3, of three tokens one outside of twice 0.5: `-0.001 * (2/3 - 0.05 / 3) = -0.00065`."""
    scores, batch = in_turns([[0.3, 0.5, 1.2]], [[2, 2, 2]], sampled=[[0.5, 0.5, 0.5]])
    terms = {}
    for turns in (4, 6):  # the row comes half way through 4 turns, not through 6
        algorithm = with_fresh_loss(load("epo_agents", turns=turns), batch)
        terms[turns] = evaluate(algorithm.loss, scores, prepare(algorithm, batch)).value
    np.testing.assert_allclose([terms[4], terms[6]], [-0.00065, -0.001 * 2 / 3], rtol=1e-4)
    late = dataclasses.replace(batch, step=jnp.asarray(75))
    algorithm = with_fresh_loss(load("epo_agents", turns=4, steps=150), late)
    value = evaluate(algorithm.loss, scores, prepare(algorithm, late)).value
    np.testing.assert_allclose(value, -0.001 * (2 / 3 - 0.827067 * 0.05 / 3), rtol=1e-4)


def test_the_released_band_has_no_gradient_and_the_hinge_has():
    scores, batch = in_turns([[0.3, 0.5, 1.2]], [[0, 0, 0]], sampled=[[0.5, 0.5, 0.5]])

    def slope(**kwargs):
        algorithm = with_fresh_loss(load("epo_agents", turns=1, **kwargs), batch)
        whole = whole_step(algorithm.loss, scores, prepare(algorithm, batch))
        return jax.grad(lambda h: algorithm.loss(dataclasses.replace(scores, entropy=h), whole)[0])(scores.entropy)

    np.testing.assert_allclose(slope()[0, 0], [-0.001 / 3] * 3, rtol=1e-5)
    np.testing.assert_allclose(slope(band=hinge)[0, 0], [-0.001 / 3, -0.001 / 3, 0], rtol=1e-5, atol=1e-9)


def test_epo_without_entropy_is_grpo():
    scores, batch = random_batch(jax.random.key(1))
    assert_equal_runs(run(load("epo_agents", entropy=0.0), scores, batch), run(load("grpo", kl=None), scores, batch))


@pytest.mark.parametrize("argument", ["steps", "turns"])
def test_epo_needs_steps_and_turns(argument):
    with pytest.raises(ValueError, match="1 or more"):
        load("epo_agents", **{argument: 0})


# --- ReMix ------------------------------------------------------------------------------------------------------------


def test_the_base_fades_from_the_divergence():
    got = [share_of_base(jnp.asarray(t)) for t in (0, 50, 51, 60, 61, 75, 100, 150, 10**6)]
    np.testing.assert_allclose(got, [1, 1, 0.9, 0.9, 0.8, 0.7, 0.5, 0.5, 0.5], rtol=1e-6)


def test_the_clip_is_around_where_the_policy_stands():
    """Ratio 1.6 to the sampler, 1.3 before the update: the bound is 1.5, where an ordinary clip's is 1.2."""

    def objective(ratio, advantage, center):
        return -clip_around(jnp.asarray(ratio), jnp.asarray(advantage), 0.0, center=jnp.asarray(center), width=0.2)

    np.testing.assert_allclose([objective(1.6, 1.0, 1.3), objective(1.6, 1.0, 1.0)], [1.5, 1.2], rtol=1e-6)
    np.testing.assert_allclose(objective(0.5, -1.0, 0.8), -0.6, rtol=1e-6)
    for advantage in (1.0, -1.0):  # nothing is clipped before the policy moves
        slope = jax.grad(lambda log_r, a=advantage: objective(jnp.exp(log_r), a, 1.3))(jnp.log(1.3))
        np.testing.assert_allclose(slope, 1.3 * advantage, rtol=1e-5)


def test_centers_are_1_on_policy_and_ignore_what_is_masked():
    scores, batch = random_batch(KEY)
    same = dataclasses.replace(batch, old=Scores(logp=batch.rollouts.logp))
    np.testing.assert_array_equal(centers(scores, same)["center"], 1)
    poisoned = centers(*random_batch(KEY, fill=jnp.nan))["center"]
    np.testing.assert_array_equal(poisoned, centers(scores, batch)["center"])
    want = jnp.where(batch.mask, batch.old.logp - batch.rollouts.logp, 0)
    np.testing.assert_allclose(jnp.log(poisoned), want, atol=1e-5)


def test_the_divergence_is_from_two_policies():
    """Halfway, with k2: `0.1 * (0.5 * (l - base)^2 / 2 + 0.5 * (l - before)^2 / 2)`."""
    batch = toy_batch(
        logp=[[[-1.0, -1.0]]], old=[[[-1.0, -1.0]]], reference=[[[-2.0, -3.0]]], keep=jnp.ones((1, 1), bool)
    )
    batch = dataclasses.replace(batch, step=jnp.asarray(100))
    scores = Scores(logp=jnp.array([[[-1.5, -1.5]]]))
    alone = convex_kl(scores, batch, weight=0.1, estimator=k2, floor=0.5)
    np.testing.assert_allclose(alone[0, 0], 0.1 * np.array([0.125 + 0.125, 1.125 + 0.125]) / 2, rtol=1e-5)
    old = dataclasses.replace(batch.old, extras={"previous": jnp.array([[[-2.5, -1.5]]])})
    after = convex_kl(scores, dataclasses.replace(batch, old=old), weight=0.1, estimator=k2, floor=0.5)
    np.testing.assert_allclose(after[0, 0], 0.1 * np.array([0.125 + 0.5, 1.125]) / 2, rtol=1e-5)


def test_an_update_sees_what_the_policy_of_a_step_ago_says():
    """Parameters are a number, added to every log-prob; the update adds 1."""
    stage = with_previous(
        lambda key, models, batch, learn: (*step_by_one(models, batch)[:1], {"seen": previous(batch)})
    )
    batch, models = at(0), ({"policy": jnp.array(5.0)}, {"policy": jnp.array(0)})
    zero = jnp.zeros(batch.mask.shape)

    class Learn:
        def world(self, models):
            return World(
                sample=None,
                score=lambda role, rollouts: Scores(logp=models[0][role] + zero),
                reward=None,
                models=models[0],
                step=batch.step,
                length=5,
            )

    problem = Problem(rows=1, prompts=1, length=5, vocab=3, params=models[0])
    memory = stage.init(problem)
    for want in (5, 5, 6):  # in the first step there is none before
        (models, metrics), memory = stage.apply(memory, KEY, models, batch, Learn())
        np.testing.assert_array_equal(metrics["seen"], want + zero)
    assert models[0]["policy"] == 8


def test_batches_are_reused_until_the_step():
    class Learn:
        def __call__(self, models, batch, loss=None):
            return models + 1, {"loss": jnp.zeros(())}

    for step, passes in ((3, 2), (4, 1)):
        models, _ = reused(KEY, jnp.array(0), at(step), Learn(), until=4, epochs=2, minibatches=1)
        assert models == passes


def recalling(step, seen):
    """Answers at step `s` are `[100 s + prompt, 100 s + prompt]` of log-prob `-s`; notes the limits."""

    def sample(key, prompts, size, limit=None, **_):
        seen.append(limit)
        b = prompts.index.shape[0]
        mask = jnp.broadcast_to(limit[..., None] > 0, (b, size, 2))
        tokens = jnp.where(mask, 100 * step + prompts.index[:, None, None], 0)
        rollouts = toy_batch(logp=jnp.where(mask, -float(step), 0.0), mask=mask, tokens=tokens).rollouts
        version = jnp.full(mask.shape, step, jnp.int32)
        return dataclasses.replace(rollouts, prompts=prompts, version=version)

    def reward(rollouts):
        """The step, and NaN in the groups of prompt 3."""
        return jnp.where(rollouts.prompts.index[:, None] % 10 == 3, jnp.nan, step + jnp.zeros(rollouts.mask.shape[:2]))

    return World(sample=sample, score=None, reward=reward, models={}, step=jnp.asarray(step), length=2)


def steps_of(stage, count):
    """The rollouts of some steps, whose prompts have the indices `10 * step + 0 to 3`, and their limits."""
    prompts = toy_prompts(4)
    example = jax.eval_shape(lambda: prompts)
    memory = stage.init(Problem(rows=99, prompts=4, length=2, vocab=3, params={}, example=example))
    rollouts, limits = [], []
    for step in range(count):
        here = dataclasses.replace(prompts, index=prompts.index + 10 * step)
        got, memory = stage.apply(memory, jax.random.key(step), recalling(step, limits), here)
        rollouts.append(got)
    return rollouts, limits


def test_recalled_groups_are_whole_recent_and_as_they_were_sampled():
    rollouts, limits = steps_of(sample_or_recall(size=3, steps=2, chance=0.6, until=99), 12)
    ages = []
    for step, (got, limit) in enumerate(zip(rollouts, limits, strict=True)):
        version = got.version[:, 0, 0]
        age = step - version
        ages += age.tolist()
        np.testing.assert_array_equal(got.version, jnp.broadcast_to(version[:, None, None], got.version.shape))
        np.testing.assert_array_equal(got.logp, -got.version)
        np.testing.assert_array_equal(got.prompts.index // 10, version)  # prompts come with their groups
        np.testing.assert_array_equal(got.tokens[:, :, 0], (100 * version + got.prompts.index)[:, None] + 0 * limit)
        np.testing.assert_array_equal(got.context.tokens[:, 0], got.prompts.context.tokens)
        np.testing.assert_array_equal(limit > 0, jnp.broadcast_to((age == 0)[:, None], limit.shape))
        np.testing.assert_array_equal(got.generated, jnp.where(age == 0, 6, 0))
        assert (got.role == POLICY).all()
        unscored = (got.prompts.index % 10 == 3) & (age == 0)  # such groups are not recalled
        np.testing.assert_array_equal(got.outcome[:, 0], jnp.where(unscored, jnp.nan, version))
        assert not ((got.prompts.index % 10 == 3) & (age > 0)).any()
        recalled = got.prompts.index[age > 0].tolist()
        assert len(set(recalled)) == len(recalled)  # without replacement
    assert set(ages[:4]) == {0} and set(ages) == {0, 1, 2}


def test_nothing_is_recalled_without_chance_or_after_the_step():
    for chance, until, want in ((0.0, 99, []), (1.0, 99, [1, 3, 5]), (1.0, 3, [1])):
        rollouts, _ = steps_of(sample_or_recall(size=2, steps=1, chance=chance, until=until), 6)
        # With chance 1 there are new groups to recall after every other step only.
        assert [step for step, got in enumerate(rollouts) if (got.version < step).any()] == want


@pytest.mark.parametrize("argument", [{"size": 0, "steps": 1}, {"size": 1, "steps": 0}])
def test_recall_needs_sizes(argument):
    with pytest.raises(ValueError, match="at least 1"):
        sample_or_recall(**argument, chance=0.5, until=9)


def test_plain_remix_is_grpo():
    scores, batch = random_batch(jax.random.key(1))
    batch = dataclasses.replace(batch, old=Scores(logp=batch.rollouts.logp), step=jnp.asarray(75))
    child = load("remix", kl=0.1, floor=1.0)
    assert_equal_runs(run(child, scores, batch), run(load("grpo", kl=0.1), scores, batch))
    assert not np.allclose(run(load("remix", kl=0.1), scores, batch)[1], run(child, scores, batch)[1])
    off = dataclasses.replace(batch, old=Scores(logp=batch.rollouts.logp + 0.3))
    assert not np.allclose(run(child, scores, off)[1], run(child, scores, batch)[1])
