"""Methods that learn from their own samples and from responses that came with the data."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.advantages.sources import among_own, one_on_injected
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.chord import alike, probable, uncertain, warm_cosine, weighted_likelihood
from jaxrl_llm.algorithms.dph_rl import alpha_divergence, forward_kl, jensen_shannon
from jaxrl_llm.algorithms.rl_plus import exploration, mixture_weight
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.losses.surrogates import dual_clip, unclipped
from jaxrl_llm.rollouts.mixed import before_step, carries_logged, logged_or_sampled, side_by_side, with_logged
from jaxrl_llm.stages import write
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts
from jaxrl_llm.types import INJECTED, PADDING, POLICY, Logged, Sampling, Scores, World
from jaxrl_llm.weights.gates import injected_if_rare, own_or_injected, solved

T = 3


def with_data(prompts, *, empty=()):
    """Two responses a prompt: `[90]`, wrong, and `[80, 81, 82, 83]`, right; none for the prompts in `empty`."""
    b = prompts.index.shape[0]
    tokens = jnp.broadcast_to(jnp.array([[90, 0, 0, 0], [80, 81, 82, 83]]), (b, 2, 4))
    there = ~jnp.isin(prompts.index, jnp.array(empty, jnp.int32))
    mask = (tokens > 0) & there[:, None, None]
    return dataclasses.replace(
        prompts, logged=Logged(tokens=tokens, mask=mask, reward=jnp.tile(jnp.array([0.0, 1.0]), (b, 1)))
    )


def world(*, step=7, seen=None, sampling=None):
    """Answers with `[1, 2]` of log-prob -1, as far as the row's limit goes, and notes the limits."""

    def sample(key, prompts, size, limit=None, **_):
        b = prompts.index.shape[0]
        limit = jnp.full((b, size), T) if limit is None else jnp.broadcast_to(limit, (b, size))
        if seen is not None:
            seen.append(limit)
        mask = (jnp.arange(T) < 2) & (jnp.arange(T) < limit[..., None])
        tokens = jnp.where(mask, jnp.arange(1, T + 1), 0)
        rollouts = toy_batch(logp=jnp.where(mask, -1.0, 0.0), mask=mask, tokens=tokens).rollouts
        return dataclasses.replace(
            rollouts, prompts=prompts, outcome=None, sampling=rollouts.sampling if sampling is None else sampling
        )

    return World(sample=sample, score=None, reward=None, models={}, step=jnp.asarray(step), length=T)


def mixed_batch(key, *, fill=0.0, prompts=3, size=4, length=5):
    """`random_batch` whose last row of each group is somebody else's: log-probs of the sampler 0, outcome 1."""
    scores, batch = random_batch(key, prompts=prompts, size=size, length=length, fill=fill)
    last = jnp.arange(size) == size - 1
    rollouts = batch.rollouts
    foreign = rollouts.mask & last[:, None]
    role = jnp.where(foreign, INJECTED, rollouts.role).astype(jnp.int8)
    logp = jnp.where(foreign, 0.0, rollouts.logp)
    outcome = jnp.where(last & batch.keep, 1.0, batch.outcome)
    rollouts = dataclasses.replace(rollouts, role=role, logp=logp)
    return scores, dataclasses.replace(batch, rollouts=rollouts, outcome=outcome)


def run(algorithm, scores, batch):
    """Value, and gradient by every log-prob."""
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / jnp.maximum(batch.mask.sum(), 1)


def only(batch, rows):
    """The batch in which only `rows` [B G] exist."""
    return dataclasses.replace(batch, keep=batch.keep & rows)


def assert_equal_runs(a, b, *, rtol=1e-4):
    np.testing.assert_allclose(a[0], b[0], rtol=rtol, atol=1e-7)
    np.testing.assert_allclose(a[1], b[1], rtol=rtol, atol=1e-7)
    assert (a[1] != 0).any()


def assert_poison_is_invisible(name, **kwargs):
    results = []
    for fill in (0.0, jnp.nan, 1e10):
        algorithm = load(name, **kwargs)
        results.append(run(algorithm, *mixed_batch(jax.random.key(3), fill=fill)))
    assert np.isfinite(results[0][0]) and (results[0][1] != 0).any()
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)


# --- groups of two sources --------------------------------------------------------------------------------------------


def test_own_rows_come_first_then_the_best_of_the_data():
    got = with_logged(world(), jax.random.key(0), with_data(toy_prompts(2)), size=2)
    assert got.tokens.shape == (2, 3, 4)  # padded to the longer of the two
    np.testing.assert_array_equal(got.tokens[0], [[1, 2, 0, 0], [1, 2, 0, 0], [80, 81, 82, 83]])
    np.testing.assert_array_equal(got.role[0, 0], [POLICY, POLICY, PADDING, PADDING])
    np.testing.assert_array_equal(got.role[0, 2], [INJECTED] * 4)
    np.testing.assert_array_equal(got.mask.sum(-1), [[2, 2, 4]] * 2)
    np.testing.assert_array_equal(got.logp[1, :, 0], [-1, -1, 0])
    np.testing.assert_array_equal(got.version[0, 2], [7] * 4)
    assert got.outcome is None  # the verifier judges them all
    np.testing.assert_array_equal(got.injected, [[False, False, True]] * 2)


def test_rows_of_the_data_are_scored_without_the_samplers_filters():
    shape = (2, 2)
    sampling = Sampling(temperature=jnp.full(shape, 0.6), top_k=jnp.full(shape, 20), top_p=jnp.full(shape, 0.9))
    got = with_logged(world(sampling=sampling), jax.random.key(0), with_data(toy_prompts(2)), size=2).sampling
    np.testing.assert_allclose(got.temperature[0], [0.6, 0.6, 1.0])
    np.testing.assert_array_equal(got.top_k[0], [20, 20, 0])
    np.testing.assert_allclose(got.top_p[0], [0.9, 0.9, 1.0])
    assert got.min_p is None and got.top_k.dtype == jnp.int32


def test_a_prompt_has_either_samples_or_its_response():
    seen = []
    prompts = with_data(toy_prompts(3), empty=(1,))
    got = logged_or_sampled(world(seen=seen), jax.random.key(0), prompts, size=2, which=carries_logged)
    np.testing.assert_array_equal(seen[0], [[0, 0], [T, T], [0, 0]])
    np.testing.assert_array_equal(got.mask.any(-1), [[False, False, True], [True, True, False], [False, False, True]])
    np.testing.assert_array_equal(got.role != PADDING, got.mask)


def test_before_a_step_all_prompts_give_theirs():
    for step, rows in ((4, [False, False, True]), (5, [True, True, False])):
        which = partial(before_step, step=5)
        got = logged_or_sampled(world(step=step), jax.random.key(0), with_data(toy_prompts(1)), size=2, which=which)
        np.testing.assert_array_equal(got.mask.any(-1), [rows])


def test_data_without_responses_is_refused():
    with pytest.raises(ValueError, match="no responses"):
        carries_logged(world(), toy_prompts(1))
    with pytest.raises(ValueError, match="no responses"):
        with_logged(world(), jax.random.key(0), toy_prompts(1), size=2)


def test_side_by_side_keeps_what_it_was_given():
    prompts = with_data(toy_prompts(2))
    both = with_logged(world(), jax.random.key(0), prompts, size=2)
    again = side_by_side(both, both)
    np.testing.assert_array_equal(again.tokens[:, :3], both.tokens)
    np.testing.assert_array_equal(again.tokens[:, 3:], both.tokens)


# --- credit and losses of two sources ---------------------------------------------------------------------------------


def test_own_rows_are_compared_with_each_other_only():
    """Rewards 1, 0, 0 and 1 of a demonstration: mean 1/3, std 1/sqrt(3); with it, they would be 1/2."""
    mask = jnp.ones((1, 4, 2), bool)
    role = jnp.full((1, 4, 2), POLICY).at[0, 3].set(INJECTED)
    batch = toy_batch(logp=-jnp.ones(mask.shape), role=role, outcome=jnp.array([[1.0, 0.0, 0.0, 1.0]]))
    got = among_own(batch, advantage=partial(per_group, center_scale))
    np.testing.assert_allclose(got[0, :, 0], [2 / np.sqrt(3), -1 / np.sqrt(3), -1 / np.sqrt(3), 0], rtol=1e-4)
    batch = write("advantage", batch, got)
    np.testing.assert_allclose(one_on_injected(batch)[0, :, 1], [*got[0, :3, 1], 1.0])
    with pytest.raises(ValueError, match="after another"):
        one_on_injected(dataclasses.replace(batch, advantage=None))


def test_each_part_has_its_own_denominator():
    """5 own tokens at -1 and 2 of the data at -3: means 1 and 3, whatever the other's length."""
    mask = jnp.array([[[1, 1, 1], [1, 1, 0], [1, 1, 0]]], bool)
    role = jnp.where(mask, POLICY, PADDING).at[0, 2].set([INJECTED, INJECTED, PADDING])
    logp = jnp.array([[[-1.0, -1, -1], [-1, -1, jnp.nan], [-3, -3, jnp.nan]]])
    batch = toy_batch(logp=logp, mask=mask, role=role, advantage=jnp.ones((1, 3)))
    loss = MixedLoss(
        parts={
            "own": Part(rows=own, loss=NegativeLogLikelihood()),
            "data": Part(rows=injected, loss=NegativeLogLikelihood(), weight=0.5),
        }
    )
    got = evaluate(loss, Scores(logp=logp), batch)
    np.testing.assert_allclose(got.value, 1 + 0.5 * 3)
    np.testing.assert_allclose(got.coefficient[0, :, 0] / 7, [-1 / 5, -1 / 5, -0.5 / 2])
    np.testing.assert_allclose([got.metrics["loss/own"], got.metrics["loss/data"]], [1, 3])
    np.testing.assert_allclose([got.metrics["own/nll"], got.metrics["data/nll"]], [1, 3])
    with pytest.raises(ValueError, match="through the engine"):
        loss(Scores(logp=logp), batch)


def test_a_part_without_rows_is_zero():
    scores, batch = random_batch(jax.random.key(0))  # nothing injected
    loss = MixedLoss(parts={"data": Part(rows=injected, loss=NegativeLogLikelihood())})
    got = evaluate(loss, scores, dataclasses.replace(batch, advantage=jnp.zeros(batch.mask.shape)))
    assert got.value == 0 and not got.coefficient.any() and got.metrics["data/nll"] == 0


# --- CHORD ------------------------------------------------------------------------------------------------------------


def test_weights_of_a_demonstrations_tokens():
    p = jnp.array([0.1, 0.5, 0.9, 1.0])
    np.testing.assert_allclose(uncertain(p), [0.09, 0.25, 0.09, 0.0], atol=1e-7)
    np.testing.assert_allclose(alike(p), 1)
    np.testing.assert_allclose(probable(p), p)


def test_weights_have_no_gradient_and_ignore_impossible_tokens():
    logp = jnp.log(jnp.array([0.1, 0.5, 0.9]))
    slope = jax.grad(lambda l: weighted_likelihood(jnp.ones(3), jnp.ones(3), l, weight=uncertain).sum())(logp)
    np.testing.assert_allclose(slope, [-0.09, -0.25, -0.09], rtol=1e-5)
    tiny = jax.grad(lambda l: weighted_likelihood(1.0, 1.0, l, weight=uncertain))(-1e4)
    assert np.isfinite(tiny) and abs(tiny) < 1e-6


@pytest.mark.parametrize(
    "schedule, steps, want",
    [
        (
            {"peak": 0.9, "valley": 0.05, "warmup": 0, "decay": 200},
            [0, 50, 100, 200, 999],
            [0.9, 0.77552, 0.475, 0.05, 0.05],
        ),
        (
            {"peak": 0.5, "valley": 0.02, "warmup": 200, "decay": 400},
            [0, 100, 200, 400, 600],
            [0, 0.25, 0.5, 0.26, 0.02],
        ),
        ({"peak": 0.1, "valley": 0.1, "warmup": 0, "decay": 200}, [0, 77, 300], [0.1, 0.1, 0.1]),
    ],
)
def test_schedule_of_mu(schedule, steps, want):
    _, batch = random_batch(jax.random.key(0))
    got = [warm_cosine(dataclasses.replace(batch, step=jnp.asarray(step)), **schedule) for step in steps]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_chord_with_mu_0_is_grpo_on_the_own_rows():
    scores, batch = mixed_batch(jax.random.key(1))
    got = run(load("chord", peak=0.0, valley=0.0), scores, batch)
    assert_equal_runs(got, run(load("grpo", kl=None), scores, only(batch, ~batch.rollouts.injected)))


def test_chord_with_mu_1_is_sft_on_the_demonstrations():
    scores, batch = mixed_batch(jax.random.key(1))
    got = run(load("chord", peak=1.0, valley=1.0, weighting=alike), scores, batch)
    assert_equal_runs(got, run(load("sft"), scores, only(batch, batch.rollouts.injected)))


def test_chord_mixes_the_two_and_weighs_tokens():
    scores, batch = mixed_batch(jax.random.key(1))
    foreign = batch.rollouts.injected
    value, gradient = run(load("chord", peak=0.3, valley=0.3), scores, batch)
    rl = run(load("grpo", kl=None), scores, only(batch, ~foreign))
    mask = batch.mask & foreign[..., None]
    p = jnp.exp(jnp.where(mask, scores.logp, 0.0))
    want = -jnp.where(mask, p * (1 - p), 0) / mask.sum()
    np.testing.assert_allclose(gradient, 0.7 * rl[1] + 0.3 * want, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(value, 0.7 * rl[0] + 0.3 * (want * jnp.where(mask, scores.logp, 0)).sum(), rtol=1e-4)


def test_chord_ignores_what_is_masked():
    assert_poison_is_invisible("chord")


def test_chord_refuses_steps_below_0():
    with pytest.raises(ValueError, match="0 or more"):
        load("chord", warmup=-1)


# --- HPT --------------------------------------------------------------------------------------------------------------


def passing(*rates, length=2):
    """A prompt for each number of right answers out of 4, with a right demonstration as the fifth row."""
    outcome = jnp.array([[1.0] * n + [0.0] * (4 - n) + [1.0] for n in rates])
    shape = (len(rates), 5, length)
    role = jnp.full(shape, POLICY).at[:, 4].set(INJECTED)
    return toy_batch(logp=-0.5 * jnp.ones(shape), role=role, outcome=outcome, keep=jnp.ones(shape[:2], bool))


def test_pass_rates_are_of_the_own_rows_that_count():
    batch = passing(0, 1, 4)
    np.testing.assert_array_equal(solved(batch)[0], [0, 1, 4])
    np.testing.assert_array_equal(solved(batch)[1], [4, 4, 4])
    fewer = dataclasses.replace(batch, keep=batch.keep.at[2, :2].set(False))
    np.testing.assert_array_equal(solved(fewer), [[0, 1, 2], [4, 4, 2]])


@pytest.mark.parametrize("gate, explores", [(0.0, [0, 1, 1, 1]), (0.25, [0, 0, 1, 1]), (-1.0, [1] * 4), (1.0, [0] * 4)])
def test_the_gate_is_closed_at_equality(gate, explores):
    got = own_or_injected(passing(0, 1, 2, 4), gate=gate)
    np.testing.assert_array_equal(got, [[bool(e)] * 4 + [not e] for e in explores])


def test_hpt_above_the_gate_is_dr_grpo_without_clip():
    scores, batch = mixed_batch(jax.random.key(1))
    parent = load("dr_grpo")
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, surrogate=unclipped))
    got = run(load("hpt", gate=-1.0, entropy=None), scores, batch)
    assert_equal_runs(got, run(parent, scores, only(batch, ~batch.rollouts.injected)))


def test_hpt_below_the_gate_is_sft():
    scores, batch = mixed_batch(jax.random.key(1))
    got = run(load("hpt", gate=1.0), scores, batch)
    assert_equal_runs(got, run(load("sft"), scores, only(batch, batch.rollouts.injected)))
    half = run(load("hpt", gate=1.0, expert_weight=0.3), scores, batch)
    np.testing.assert_allclose(half[1], 0.3 * got[1], rtol=1e-5)


def test_hpt_has_a_denominator_for_each_source():
    """One prompt of each kind; 4 own rows over 2 tokens each at A = +-1/2, and 2 tokens of a demonstration."""
    batch = passing(0, 2)
    _, gradient = run(load("hpt", entropy=None), Scores(logp=batch.rollouts.logp), batch)
    np.testing.assert_allclose(gradient[0, :, 0], [0, 0, 0, 0, -1 / 2])
    np.testing.assert_allclose(gradient[1, :, 0], [-0.5 / 8, -0.5 / 8, 0.5 / 8, 0.5 / 8, 0], atol=1e-7)


def test_hpt_learns_nothing_where_all_is_right():
    batch = passing(4, 4)
    value, gradient = run(load("hpt", entropy=None), Scores(logp=batch.rollouts.logp), batch)
    assert value == 0 and not gradient.any()


def test_hpt_keeps_the_entropy_of_own_rows_up():
    scores, batch = mixed_batch(jax.random.key(1))
    with_bonus, without = (run(load("hpt", gate=-1.0, entropy=e), scores, batch)[0] for e in (0.5, None))
    mask = batch.mask & ~batch.rollouts.injected[..., None]
    rows = mask.any(-1).sum()
    entropy = jnp.where(mask, scores.entropy, 0).sum() / (rows * 5)
    np.testing.assert_allclose(with_bonus - without, -0.5 * entropy, rtol=1e-4)


def test_hpt_ignores_what_is_masked():
    assert_poison_is_invisible("hpt", gate=0.4)


# --- AHPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fewer_than, on", [(0.0, [0, 0, 0]), (1.0, [1, 0, 0]), (2.0, [1, 1, 0]), (9.0, [1, 1, 1])])
def test_the_expert_is_asked_where_few_are_right(fewer_than, on):
    got = injected_if_rare(passing(0, 1, 2), fewer_than=fewer_than)
    np.testing.assert_array_equal(got[..., 0], [[1, 1, 1, 1, x] for x in on])


def test_ahpo_without_experts_is_grpo():
    scores, batch = mixed_batch(jax.random.key(1))
    parent = load("grpo", kl=None)
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, aggregate=token_mean))
    want = run(parent, scores, only(batch, ~batch.rollouts.injected))
    assert_equal_runs(run(load("ahpo", fewer_than=0.0), scores, batch), want)

    likelihood = dataclasses.replace(load("sft"), loss=NegativeLogLikelihood(aggregate=sequence_mean_token_mean))
    always = run(load("ahpo", fewer_than=9.0), scores, batch)
    expert = run(likelihood, scores, only(batch, batch.rollouts.injected))
    np.testing.assert_allclose(always[0], want[0] + expert[0], rtol=1e-4)
    np.testing.assert_allclose(always[1], want[1] + expert[1], rtol=1e-4, atol=1e-7)


def test_ahpos_expert_is_normalised_by_its_own_tokens():
    """One of two prompts asks for its demonstration, of 2 tokens: `1/2 * 1/2` each. The own rows stay, at A = 0."""
    batch = passing(0, 4)
    _, gradient = run(load("ahpo"), Scores(logp=batch.rollouts.logp), batch)
    np.testing.assert_allclose(gradient[0, :, 0], [0, 0, 0, 0, -1 / 4])
    assert not gradient[1].any()


def test_ahpo_ignores_what_is_masked():
    assert_poison_is_invisible("ahpo", fewer_than=2.0)


# --- RL-PLUS ----------------------------------------------------------------------------------------------------------

PI, OLD = jnp.array([0.2, 0.5, 0.05]), jnp.array([0.1, 0.5, 0.8])


def test_weights_of_an_experts_tokens():
    np.testing.assert_allclose(mixture_weight(PI, OLD), [0.615385, 0.8, 0.058824], rtol=1e-5)
    np.testing.assert_allclose(exploration(PI), [0.894427, 0.707107, 0.974679], rtol=1e-5)
    assert mixture_weight(jnp.array(1.0), jnp.array(0.0)) <= 4  # however unlikely it was
    np.testing.assert_allclose(mixture_weight(PI, OLD, unknown=0.1), 2 * PI / (1.5 * OLD + 0.05), rtol=1e-6)


def test_rl_plus_weighs_the_experts_tokens_and_their_gradient():
    """An expert's row of 3 tokens, right, and an own one, wrong: A = +-1/2, over 2 rows of 3 tokens."""
    own_logp = jnp.log(jnp.array([0.3, 0.4, 0.5]))
    old = jnp.stack([own_logp - 0.1, jnp.log(OLD)])[None]
    logp = jnp.stack([own_logp, jnp.log(PI)])[None]
    role = jnp.array([[[POLICY] * 3, [INJECTED] * 3]])
    batch = toy_batch(logp=old, old=old, role=role, outcome=jnp.array([[0.0, 1.0]]), keep=jnp.ones((1, 2), bool))
    value, gradient = run(load("rl_plus", entropy=None), Scores(logp=logp), batch)
    weights = jnp.array([0.550417, 0.565685, 0.057334])
    np.testing.assert_allclose(gradient[0, 1], -0.5 * weights / 6, rtol=1e-5)
    np.testing.assert_allclose(gradient[0, 0], 0.5 * np.exp(0.1) / 6, rtol=1e-5)
    np.testing.assert_allclose(value, -0.5 * (weights.sum() - 3 * np.exp(0.1)) / 6, rtol=1e-5)


def test_rl_plus_without_an_expert_is_dr_grpo_without_clip():
    scores, batch = random_batch(jax.random.key(1))
    parent = load("dr_grpo")
    ratio = partial(token_ratio, old=recomputed)
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, surrogate=unclipped, ratio=ratio))
    assert_equal_runs(run(load("rl_plus", entropy=None), scores, batch), run(parent, scores, batch))


def test_rl_plus_compares_all_rows():
    """The mean is over the group with its demonstration: 1/5 of the prompt nobody solves."""
    prepared = prepare(load("rl_plus"), passing(0))
    np.testing.assert_allclose(prepared.advantage[0, :, 0], [-0.2] * 4 + [0.8], rtol=1e-5)


def test_rl_plus_needs_room_for_its_own():
    with pytest.raises(ValueError, match="2 or more"):
        load("rl_plus", group_size=1)


def test_rl_plus_ignores_what_is_masked():
    assert_poison_is_invisible("rl_plus")


# --- DPH-RL -----------------------------------------------------------------------------------------------------------

GENERATORS = {
    forward_kl: ([0.193147, 0, 0.306853], [-0.5, 0, 1]),
    jensen_shannon: ([0.084950, 0, 0.169899], [-0.202733, 0, 0.575364]),
    alpha_divergence: ([0.160318, 0, 0.368118], [-0.371746, 0, 1.294494]),
}


@pytest.mark.parametrize("divergence", GENERATORS)
def test_generators_are_0_and_flat_at_1(divergence):
    """Values and slopes by log u at u = 1/2, 1, 2."""
    values, slopes = GENERATORS[divergence]
    u = jnp.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(divergence(u), values, atol=1e-5)
    slope = jax.vmap(jax.grad(lambda log_u: divergence(jnp.exp(log_u))))(jnp.log(u))
    np.testing.assert_allclose(slope, slopes, atol=1e-5)
    far = jnp.exp(jnp.linspace(-20, 20, 41))
    assert (divergence(far) >= -1e-5).all() and np.isfinite(divergence(far)).all()


def test_the_divergence_is_from_the_base_in_the_mean_over_its_samples():
    """Enumerated over three actions: `E_base[u - log u - 1]` is `KL(base || pi)`, forward."""
    base, pi = np.array([0.7, 0.2, 0.1]), np.array([0.2, 0.3, 0.5])
    np.testing.assert_allclose((base * forward_kl(pi / base)).sum(), (base * np.log(base / pi)).sum(), rtol=1e-5)


def test_rehearsal_pulls_back_to_the_base():
    """One prompt explores two rows of equal reward; the other rehearses 2 tokens at u = 1/2 and 2."""
    mask = jnp.array([[[1, 1], [1, 1], [0, 0]], [[0, 0], [0, 0], [1, 1]]], bool)
    role = jnp.where(mask, POLICY, PADDING).at[1, 2].set(INJECTED)
    base = jnp.full(mask.shape, -1.0)
    logp = base.at[1, 2].set(-1 + jnp.log(jnp.array([0.5, 2.0])))
    batch = toy_batch(
        logp=base, reference=base, mask=mask, role=role, outcome=jnp.ones((2, 3)), keep=jnp.ones((2, 3), bool)
    )
    value, gradient = run(load("dph_rl", weight=0.1), Scores(logp=logp), batch)
    np.testing.assert_allclose(gradient[1, 2], 0.1 * np.array([-0.5, 1.0]) / 2, rtol=1e-5)
    np.testing.assert_allclose(value, 0.1 * 0.25, rtol=1e-5)  # (.193147 + .306853) / 2
    assert not gradient[0].any() and not gradient[1, :2].any()
    _, bounded = run(load("dph_rl", weight=0.1, bound=0.25), Scores(logp=logp), batch)
    np.testing.assert_allclose(bounded[1, 2], [-0.025, 0], rtol=1e-5)


def test_dph_rl_without_rehearsal_is_grpo_with_a_dual_clip():
    scores, batch = mixed_batch(jax.random.key(1))
    parent = load("grpo", kl=None)
    surrogate = partial(dual_clip, low=0.2, high=0.28, bound=1.3)
    parent = dataclasses.replace(
        parent, loss=dataclasses.replace(parent.loss, aggregate=token_mean, surrogate=surrogate)
    )
    want = run(parent, scores, only(batch, ~batch.rollouts.injected))
    assert_equal_runs(run(load("dph_rl", weight=0.0, dual=1.3), scores, batch), want)
    scores, batch = random_batch(jax.random.key(1))
    assert_equal_runs(run(load("dph_rl", dual=1.3), scores, batch), run(parent, scores, batch))


def test_dph_rl_needs_the_base():
    scores, batch = mixed_batch(jax.random.key(1))
    with pytest.raises(ValueError, match="base policy as reference"):
        run(load("dph_rl"), scores, dataclasses.replace(batch, reference=None))


def test_dph_rl_ignores_what_is_masked():
    assert_poison_is_invisible("dph_rl")


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, samples", [("chord", 8), ("hpt", 8), ("ahpo", 8), ("rl_plus", 7), ("dph_rl", 8), ("demo_reg", 4)]
)
def test_groups_have_samples_and_one_demonstration(name, samples):
    prompts = with_data(toy_prompts(2))
    got = load(name).rollout(world(), jax.random.key(0), prompts)
    np.testing.assert_array_equal(got.tokens.shape, (2, samples + 1, 4))
    np.testing.assert_array_equal(got.injected, [[False] * samples + [True]] * 2)
