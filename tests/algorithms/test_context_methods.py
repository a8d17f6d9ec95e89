"""Methods that read one response under two contexts: critiques, privileged teachers, corrupted prompts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.adjust import adjust
from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithm import changes
from jaxrl_llm.algorithms import load, xrpo
from jaxrl_llm.algorithms.clpo import informative_or_all
from jaxrl_llm.algorithms.critique_grpo import right_answer, sample_and_refine, verdict
from jaxrl_llm.algorithms.opsd import with_solution_for_teacher
from jaxrl_llm.algorithms.papo import double_entropy, with_blanks
from jaxrl_llm.algorithms.xrpo import sharpened
from jaxrl_llm.engine import learner
from jaxrl_llm.filters.basic import informative
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.divergence import at_top, forward_kl, from_teacher, jensen_shannon, reverse_kl
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.shaped import shaped, shaped_ratio
from jaxrl_llm.losses.surrogates import clip_min, unclipped
from jaxrl_llm.prompts.blank import blanked
from jaxrl_llm.prompts.corpus import empty_corpus, token_counts, with_examples, with_solved
from jaxrl_llm.prompts.judging import Words, after, says, tasks_of
from jaxrl_llm.prompts.solution import solution
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.inject import best_row, injected, with_row
from jaxrl_llm.rollouts.rewrite import EASY, HARD, MEDIUM, difficulty
from jaxrl_llm.rollouts.rounds import gains, greedy, sample_in_rounds, two_sided
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts, toy_rows
from jaxrl_llm.types import INJECTED, PADDING, POLICY, Context, Logged, Problem, Sampling, Scores, World
from jaxrl_llm.updates.queue import empty, pop, push
from jaxrl_llm.updates.reference import averaged_reference
from jaxrl_llm.world import batch_of

T = 3


def logged(prompts):
    """Two responses a prompt: `[90, 91]`, wrong, and `[80 + row]`, right."""
    b = prompts.index.shape[0]
    right = 80 + jnp.arange(b)
    tokens = jnp.stack(
        [jnp.broadcast_to(jnp.array([90, 91, 0]), (b, T)), jnp.stack([right, 0 * right, 0 * right], -1)], 1
    )
    mask = jnp.broadcast_to(jnp.array([[True, True, False], [True, False, False]]), (b, 2, T))
    return dataclasses.replace(
        prompts, logged=Logged(tokens=tokens, mask=mask, reward=jnp.tile(jnp.array([0.0, 1.0]), (b, 1)))
    )


class Fake:
    """A world that answers with two tokens, 10 times the round plus the row, and remembers the contexts."""

    def __init__(self, outcomes, *, length=T):
        self.outcomes, self.contexts, self.length = [jnp.asarray(x) for x in outcomes], [], length

    def world(self):
        return World(
            sample=self.sample, score=None, reward=self.reward, models={}, step=jnp.asarray(3), length=self.length
        )

    def sample(self, key, prompts, size, context=None, limit=None, **_):
        self.contexts.append(context)
        b = prompts.index.shape[0]
        mask = jnp.broadcast_to(jnp.array([True, True, False]), (b, size, T))
        mask = mask if limit is None else mask & (jnp.broadcast_to(limit, (b, size)) > 0)[..., None]
        rollouts = toy_batch(logp=jnp.full((b, size, T), -float(len(self.contexts))), mask=mask).rollouts
        tokens = 10 * len(self.contexts) + jnp.broadcast_to(jnp.arange(size)[:, None], (b, size, T))
        plain = jax.tree.map(lambda x: x[:, None], prompts.context)
        return dataclasses.replace(
            rollouts, prompts=prompts, context=plain if context is None else context, tokens=tokens.astype(jnp.int32)
        )

    def reward(self, rollouts):
        return self.outcomes.pop(0)


def text(context, *row):
    return np.asarray(context.tokens[row])[np.asarray(context.mask[row])].tolist()


# --- pieces -----------------------------------------------------------------------------------------------------------


def test_the_solution_is_the_best_logged_response_that_has_tokens():
    prompts = logged(toy_prompts(2))
    tokens, mask = solution(prompts)
    assert tokens.shape == (2, 1, T) and tokens[:, 0, 0].tolist() == [80, 81] and mask.sum() == 2
    empty = dataclasses.replace(prompts.logged, mask=prompts.logged.mask.at[:, 1].set(False))
    assert solution(dataclasses.replace(prompts, logged=empty))[0][:, 0, 0].tolist() == [90, 90]
    with pytest.raises(ValueError, match=r"needs prompts\.logged"):
        solution(toy_prompts(2))


def test_best_row_prefers_the_first_of_equals_and_rows_that_can_be_scored():
    mask = jnp.ones((3, 3, 1), bool).at[2, 1].set(False)
    rollouts = toy_batch(logp=jnp.zeros((3, 3, 1)), mask=mask).rollouts
    outcome = jnp.array([[0.0, 1.0, 1.0], [jnp.nan, -5.0, jnp.nan], [0.0, 9.0, 1.0]])
    assert best_row(dataclasses.replace(rollouts, outcome=outcome)).tolist() == [1, 1, 2]


def test_a_row_moves_with_everything_that_belongs_to_it():
    def rows(fill):
        made = toy_batch(logp=jnp.full((2, 2, 3), -fill)).rollouts
        made = dataclasses.replace(made, version=jnp.full((2, 2, 3), int(fill)), truncated=jnp.full((2, 2), fill > 1))
        return dataclasses.replace(made, outcome=jnp.full((2, 2), fill), tokens=jnp.full((2, 2, 3), int(fill)))

    got = with_row(rows(1.0), injected(rows(2.0)), jnp.array([1, 0]), place=1, where=jnp.array([True, False]))
    np.testing.assert_array_equal(got.outcome, [[1, 2], [1, 1]])
    np.testing.assert_array_equal(got.tokens[..., 0], [[1, 2], [1, 1]])
    np.testing.assert_array_equal(got.version[..., 0], [[1, 2], [1, 1]])
    np.testing.assert_array_equal(got.truncated, [[False, True], [False, False]])
    np.testing.assert_array_equal(got.role[..., 0], [[POLICY, INJECTED], [POLICY, POLICY]])
    np.testing.assert_array_equal(got.logp[..., 0], [[-1, 0], [-1, -1]])


# --- critique_grpo ----------------------------------------------------------------------------------------------------


def refine(outcomes, critique=right_answer, keep_wrong=True):
    fake = Fake(outcomes)
    key, prompts = jax.random.key(0), logged(toy_prompts(2))
    got = sample_and_refine(fake.world(), key, prompts, size=3, critique=critique, keep_wrong=keep_wrong)
    return got, fake.contexts


FIRST = [[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
SECOND = [[0.0, 0.5, 1.0], [0.0, 0.0, 0.25]]


def test_one_refinement_takes_the_first_place_and_is_scored_under_the_prompt_alone():
    got, (_, context) = refine([FIRST, SECOND])
    np.testing.assert_array_equal(got.outcome, [[1.0, 1.0, 0.0], [0.25, 1.0, 0.0]])
    np.testing.assert_array_equal(got.tokens[..., 0], [[22, 11, 12], [22, 11, 12]])
    np.testing.assert_array_equal(got.role[0], [[INJECTED, INJECTED, PADDING], *[[POLICY, POLICY, PADDING]] * 2])
    np.testing.assert_array_equal(got.logp[0, :, 0], [0.0, -1.0, -1.0])
    np.testing.assert_array_equal(got.generated, [12.0, 12.0])
    assert text(got.context, 1, 0) == [2, 3] and got.context.tokens.shape == (2, 1, 2)
    # It was sampled after prompt, its own response, and the solution.
    assert text(context, 1, 2) == [2, 3, 12, 12, 81] and text(context, 0, 0) == [0, 1, 10, 10, 80]


def test_a_wrong_refinement_may_stay_out():
    got, _ = refine([FIRST, SECOND], keep_wrong=False)
    np.testing.assert_array_equal(got.outcome, [[1.0, 1.0, 0.0], FIRST[1]])
    assert got.tokens[1, 0, 0] == 10 and got.role[1, 0, 0] == POLICY


def test_a_verdict_says_right_or_wrong():
    _, (_, context) = refine([FIRST, SECOND], critique=partial(verdict, right=(7,), wrong=(8, 9)))
    assert text(context, 0, 0) == [0, 1, 10, 10, 8, 9] and text(context, 0, 1) == [0, 1, 11, 11, 7]


def test_credit_of_a_group_with_one_right_row():
    outcome = jnp.array([[1.0] + [0.0] * 7])
    batch = toy_batch(logp=jnp.zeros((1, 8, 1)), outcome=outcome)
    np.testing.assert_allclose(prepare(load("critique_grpo"), batch).advantage[0, :2, 0], [0.875, -0.125])
    scaled = prepare(load("critique_grpo", credit=center_scale), batch).advantage[0, :2, 0]
    np.testing.assert_allclose(scaled, [2.474867, -0.353552], atol=1e-5)


def injected_rows(p, fill=0.0):
    """One injected row with probabilities `p`, one of the policy, a masked token each."""
    logp = jnp.array([[[*np.log(p), fill], [-1.0, -1.0, -1.0, fill]]])
    role = jnp.array([[[INJECTED] * 3 + [PADDING], [POLICY] * 3 + [PADDING]]])
    batch = toy_batch(
        logp=jnp.array([[[0.0, 0.0, 0.0, fill], [-1.2, -1.0, -0.8, fill]]]),
        mask=role != PADDING,
        role=role,
        outcome=jnp.array([[1.0, 0.0]]),
    )
    return Scores(logp=logp, entropy=jnp.zeros_like(logp)), batch


def test_shaping_keeps_a_gradient_on_unlikely_tokens():
    scores, batch = injected_rows([0.9, 0.2, 0.05])
    ratio = shaped_ratio(scores, batch, gamma=0.1)
    np.testing.assert_allclose(ratio[0, 0, :3], [0.9, 0.666667, 0.333333], atol=1e-5)
    np.testing.assert_allclose(ratio[0, 1, :3], np.exp([0.2, 0.0, -0.2]), rtol=1e-6)
    slope = jax.grad(lambda l: shaped_ratio(Scores(logp=l), batch, gamma=0.1).sum())(scores.logp)
    np.testing.assert_allclose(slope[0, 0], [0.09, 0.222222, 0.222222, 0.0], atol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda l: shaped(jnp.exp(l), gamma=0.01))(jnp.log(0.2)), 0.045351, atol=1e-6)


def test_the_loss_of_an_injected_row_by_hand():
    scores, batch = injected_rows([0.9, 0.2, 0.05])
    got = evaluate(load("critique_grpo").loss, scores, prepare(load("critique_grpo"), batch))
    # A of +-0.5; two rows, four places: 1 / 8 a token.
    want = -0.5 * (0.9 + 2 / 3 + 1 / 3) + 0.5 * np.exp([0.2, 0.0, -0.2]).sum()
    np.testing.assert_allclose(got.value, want / 8, rtol=1e-5)
    np.testing.assert_allclose(got.coefficient[0, 0, :3], -0.5 * 6 / 8 * np.array([0.09, 2 / 9, 2 / 9]), rtol=1e-4)


@pytest.mark.parametrize("fill", [jnp.nan, 1e10])
def test_what_is_masked_changes_no_shaped_loss(fill):
    recipe = load("critique_grpo")
    clean, poisoned = (
        evaluate(recipe.loss, scores, prepare(recipe, batch))
        for scores, batch in (injected_rows([0.9, 0.2, 0.05], f) for f in (0.0, fill))
    )
    np.testing.assert_array_equal(clean.value, poisoned.value)
    np.testing.assert_array_equal(clean.coefficient, poisoned.coefficient)


def test_critique_grpo_without_injection_is_dr_grpo_without_clip():
    scores, batch = random_batch(jax.random.key(4))
    child, parent = load("critique_grpo", entropy=None), load("dr_grpo")
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, surrogate=unclipped))
    assert_equal_losses(child, parent, scores, batch)
    with pytest.raises(AssertionError):
        assert_equal_losses(child, load("dr_grpo"), scores, batch)


def assert_equal_losses(child, parent, scores, batch):
    got, want = (evaluate(a.loss, scores, prepare(a, batch)) for a in (child, parent))
    np.testing.assert_allclose(got.value, want.value, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.coefficient, want.coefficient, rtol=1e-4, atol=1e-6)
    assert (got.coefficient != 0).any()


# --- opsd -------------------------------------------------------------------------------------------------------------

STUDENT, TEACHER = jnp.log(jnp.array([0.5, 0.3, 0.2])), jnp.log(jnp.array([0.7, 0.2, 0.1]))


@pytest.mark.parametrize(
    ("divergence", "want"),
    [
        (forward_kl, 0.085123),
        (reverse_kl, 0.092033),
        (partial(jensen_shannon, beta=0.1), 0.007695),
        (jensen_shannon, 0.021901),
        (partial(jensen_shannon, beta=0.9), 0.008185),
        (partial(at_top, divergence=jensen_shannon, k=2), 0.014048),
    ],
)
def test_divergences_of_three_tokens(divergence, want):
    np.testing.assert_allclose(divergence(STUDENT + 3.0, TEACHER - 1.0), want, atol=1e-6)
    np.testing.assert_allclose(divergence(STUDENT, STUDENT), 0.0, atol=1e-7)
    np.testing.assert_allclose(jax.grad(divergence)(STUDENT, STUDENT), 0.0, atol=1e-7)
    assert (jax.grad(divergence)(STUDENT, TEACHER) != 0).any()


def test_jensen_shannon_ends_in_both_divergences_and_swaps():
    near = 1e-3
    np.testing.assert_allclose(
        jensen_shannon(STUDENT, TEACHER, beta=near) / near, forward_kl(STUDENT, TEACHER), rtol=0.01
    )
    ended = jensen_shannon(STUDENT, TEACHER, beta=1 - near) / near
    np.testing.assert_allclose(ended, reverse_kl(STUDENT, TEACHER), rtol=0.01)
    swapped = jensen_shannon(TEACHER, STUDENT, beta=0.7)
    np.testing.assert_allclose(jensen_shannon(STUDENT, TEACHER, beta=0.3), swapped, rtol=1e-5)


def test_its_gradient_goes_through_the_middle_too():
    def numeric(i, h=1e-2):
        step = h * jnp.eye(3)[i]
        return (jensen_shannon(STUDENT + step, TEACHER) - jensen_shannon(STUDENT - step, TEACHER)) / (2 * h)

    got = jax.grad(jensen_shannon)(STUDENT, TEACHER)
    np.testing.assert_allclose(got, [numeric(i) for i in range(3)], atol=1e-5)


def test_tokens_without_probability_add_nothing_and_no_nan():
    gone = jnp.array([0.0, 0.0, -jnp.inf])
    got, slope = jax.value_and_grad(reverse_kl)(STUDENT + gone, TEACHER)
    p = np.array([0.625, 0.375])
    np.testing.assert_allclose(got, np.sum(p * np.log(p / [0.7, 0.2])), rtol=1e-5)
    assert np.isfinite(slope).all()


def test_temperature_divides_both_and_multiplies_nothing():
    args = (jnp.zeros(()), jnp.zeros(()))
    got = from_teacher(STUDENT, *args, teacher=TEACHER, divergence=forward_kl, temperature=2.0)
    np.testing.assert_allclose(got, forward_kl(STUDENT / 2, TEACHER / 2), rtol=1e-6)
    assert float(got) < 0.085


def test_the_top_must_be_some_tokens():
    with pytest.raises(ValueError, match="k must be 2 to the 3 tokens"):
        at_top(STUDENT, TEACHER, divergence=forward_kl, k=1)


def test_the_teacher_reads_prompt_solution_and_transition():
    fake = Fake([])
    rollout = partial(sample_group, size=2)
    got = with_solution_for_teacher(
        fake.world(), jax.random.key(0), logged(toy_prompts(2)), rollout=rollout, transition=(5, 6)
    )
    assert [text(got.teacher, b, 0) for b in (0, 1)] == [[0, 1, 80, 5, 6], [2, 3, 81, 5, 6]]
    assert text(got.context, 1, 0) == [2, 3]


def test_without_solution_and_transition_the_teacher_reads_what_the_student_reads():
    prompts = logged(toy_prompts(2))
    nothing = dataclasses.replace(prompts.logged, mask=jnp.zeros_like(prompts.logged.mask))
    rollout = load("opsd", group_size=2).rollout
    got = rollout(Fake([]).world(), jax.random.key(0), dataclasses.replace(prompts, logged=nothing))
    assert [text(got.teacher, b, 0) for b in (0, 1)] == [text(got.context, b, 0) for b in (0, 1)]
    # Then both say the same, and neither loss nor gradient is left: see the divergences above.
    measure = load("opsd").measures["divergence"]
    same = partial(measure, tokens=jnp.zeros(()), hidden=jnp.zeros(()), teacher=STUDENT)
    np.testing.assert_allclose(same(STUDENT), 0.0, atol=1e-7)
    np.testing.assert_allclose(jax.grad(same)(STUDENT), 0.0, atol=1e-7)
    other = partial(measure, tokens=jnp.zeros(()), hidden=jnp.zeros(()), teacher=TEACHER)
    np.testing.assert_allclose(other(STUDENT), jensen_shannon(STUDENT / 1.1, TEACHER / 1.1), rtol=1e-5)


def test_the_measured_loss_is_the_mean_over_tokens():
    _, batch = toy_rows(fill=jnp.nan)
    values = jnp.array([[[1.0, 2.0, 3.0], [4.0, 5.0, jnp.nan]]])
    loss = load("opsd").loss
    shared = dataclasses.replace(batch, share=token_mean(batch.mask))
    value, _ = loss(Scores(extras={"divergence": values}), shared)
    np.testing.assert_allclose(value, 3.0)
    slope = jax.grad(lambda x: loss(Scores(extras={"divergence": x}), shared)[0])(values)
    np.testing.assert_allclose(slope, 0.2 * batch.mask)
    with pytest.raises(ValueError, match="put it into the recipe's measures"):
        loss(Scores(), shared)


def test_a_reference_follows_the_policy():
    def learn(models, batch):
        params, opt = models
        return ({**params, "policy": params["policy"] + 1.0}, opt), {}

    models = ({"policy": jnp.array(3.0), "reference": jnp.array(0.0)}, ())
    (params, _), _ = averaged_reference(None, models, None, learn, decay=0.75)
    assert float(params["policy"]) == 4.0 and float(params["reference"]) == 1.0
    (params, _), _ = averaged_reference(None, models, None, learn, decay=0.0)
    assert float(params["reference"]) == 4.0
    with pytest.raises(ValueError, match="reads none"):
        averaged_reference(None, ({"policy": jnp.array(3.0)}, ()), None, learn)


# --- papo -------------------------------------------------------------------------------------------------------------


def test_a_share_of_the_real_tokens_is_blanked():
    mask = jnp.arange(10) < jnp.array([[10], [5], [1]])
    context = Context(tokens=jnp.broadcast_to(1 + jnp.arange(10), (3, 10)), mask=mask)
    got = blanked(jax.random.key(0), context, share=0.6, blank=77)
    np.testing.assert_array_equal(((got.tokens == 77) & mask).sum(-1), [6, 3, 1])
    np.testing.assert_array_equal(got.tokens[~mask], context.tokens[~mask])
    np.testing.assert_array_equal(got.mask, mask)
    other = blanked(jax.random.key(1), context, share=0.6, blank=77)
    assert (other.tokens != got.tokens).any()
    np.testing.assert_array_equal(blanked(jax.random.key(0), context, share=0.0, blank=77).tokens, context.tokens)
    late = blanked(jax.random.key(0), context, share=1.0, blank=77, where=lambda c: jnp.arange(10) >= 5)
    np.testing.assert_array_equal((late.tokens == 77).sum(-1), [5, 0, 0])


def test_the_corrupted_prompt_is_read_beside_the_true_one():
    fake = Fake([])
    rollout, blank = partial(sample_group, size=2), partial(blanked, share=1.0, blank=77)
    got = with_blanks(fake.world(), jax.random.key(0), toy_prompts(2), rollout=rollout, blank=blank)
    assert text(got.teacher, 1, 0) == [77, 77] and text(got.context, 1, 0) == [2, 3]


def blind(fill=0.0):
    scores = Scores(logp=jnp.array([[[-0.5, -1.0, fill]]]), extras={"blind_logp": jnp.array([[[-1.2, -0.9, fill]]])})
    return scores, toy_batch(logp=jnp.array([[[-0.5, -1.0, fill]]]), mask=jnp.array([[[1, 1, 0]]]), advantage=[[0.0]])


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_dependence_on_the_prompt_by_hand(fill):
    scores, batch = blind(fill)
    got = evaluate(load("papo", kl=None, weight=1.0, entropy=None).loss, scores, batch)
    np.testing.assert_allclose(got.value, -0.100878, atol=1e-6)
    # The derivative of -k3 is -(1 - exp(l_blind - l)): the loss falls as l rises where l > l_blind.
    np.testing.assert_allclose(got.coefficient[0, 0], [-(1 - np.exp(-0.7)), -(1 - np.exp(0.1)), 0], atol=1e-6)
    got = evaluate(load("papo", kl=None, weight=None, entropy=0.5).loss, scores, batch)
    np.testing.assert_allclose(got.value, 0.5 * (0.75 + 1.05), rtol=1e-6)
    np.testing.assert_allclose(got.coefficient[0, 0], [-0.5, -0.5, 0], rtol=1e-6)


def test_dependence_is_capped():
    scores, batch = blind()
    far = dataclasses.replace(scores, extras={"blind_logp": jnp.array([[[3.0, -0.9, 0.0]]])})
    got = evaluate(load("papo", kl=None, weight=1.0, entropy=None, cap=10.0).loss, far, batch)
    np.testing.assert_allclose(got.value, -(10.0 + 0.005171) / 2, rtol=1e-5)
    assert float(got.coefficient[0, 0, 0]) == 0.0 != float(got.coefficient[0, 0, 1])


@pytest.mark.parametrize("through", [False, True])
def test_the_corrupted_view_has_a_gradient_only_on_request(through):
    scores, batch = blind()
    loss = load("papo", kl=None, through=through).loss
    shared = dataclasses.replace(batch, share=token_mean(batch.mask))
    slope = jax.grad(lambda x: loss(dataclasses.replace(scores, extras={"blind_logp": x}), shared)[0])(
        scores.extras["blind_logp"]
    )
    assert (slope != 0).any() == through


def test_papo_without_its_terms_is_grpo_over_tokens():
    scores, batch = random_batch(jax.random.key(4))
    child = load("papo", weight=None, entropy=None)
    parent = load("grpo", kl=0.01)
    wider = dataclasses.replace(parent.loss, aggregate=token_mean, surrogate=partial(clip_min, low=0.2, high=0.3))
    assert_equal_losses(child, dataclasses.replace(parent, loss=wider), scores, batch)
    same = dataclasses.replace(scores, extras={"blind_logp": scores.logp})
    assert_equal_losses(load("papo", entropy=None), dataclasses.replace(parent, loss=wider), same, batch)


# --- spark ------------------------------------------------------------------------------------------------------------

WORDS = Words(
    right=(1,),
    wrong=(2, 3),
    first=(4,),
    second=(5,),
    judge=((50,), (51,)),
    compare=((60,), (61,), (62,)),
    reflect=((70,), (71,)),
)


def verified(outcome, keep=None):
    """Rows of `[row, 9, 10 + row]`, whose final answer is what follows the 9."""
    outcome = jnp.asarray(outcome)
    b, g = outcome.shape
    row = jnp.broadcast_to(jnp.arange(g, dtype=jnp.int32), (b, g))
    tokens = jnp.stack([20 + row, jnp.full((b, g), 9), 30 + row], axis=-1)
    return toy_batch(logp=jnp.zeros((b, g, 3)), outcome=outcome, tokens=tokens, keep=keep)


def made(outcome, *, key=0, pointwise=0.0, most=8, batch=None):
    make = partial(tasks_of, words=WORDS, answer=partial(after, marker=(9,)), pointwise=pointwise, most=most)
    got = make(verified(outcome) if batch is None else batch, jax.random.key(key))
    rows = np.flatnonzero(got.there)
    return [(text(got.context, i), got.label[i, : int(got.size[i])].tolist(), int(got.index[i])) for i in rows]


def test_two_answers_are_compared_in_either_order_and_the_label_says_which_is_right():
    seen = set()
    for key in range(8):
        (context, label, index), (again, none, _) = made([[0.0, 1.0, 0.0]], key=key)
        first, second = context[3] - 30, context[5] - 30
        assert context[:3] == [0, 1, 60] and context[4] == 61 and context[6:] == [62] and index == 0
        assert {first, second} in ({0, 1}, {1, 2}) and label == ([4] if first == 1 else [5])
        seen.add((first == 1, again[3]))
        # A wrong response in full, for the verifier to judge what follows it.
        assert again[:3] == [0, 1, 70] and again[3] in (20, 22) and again[4:] == [9, again[3] + 10, 71] and none == []
    assert {order for order, _ in seen} == {True, False} and {row for _, row in seen} == {20, 22}


def test_one_answer_is_judged_and_uniform_groups_are_never_compared():
    seen = set()
    for key in range(8):
        (context, label, _), _ = made([[0.0, 1.0, 0.0]], key=key, pointwise=1.0)
        assert context[:3] == [0, 1, 50] and context[4:] == [51] and label == ([1] if context[3] == 31 else [2, 3])
        seen.add(label == [1])
    assert seen == {True, False}
    assert made([[1.0, 1.0, 1.0]]) == [([0, 1, 50, 30, 51], [1], 0)]
    (context, label, _), (again, *_) = made([[0.0, 0.0, 0.0]])
    assert context[:3] == [0, 1, 50] and context[4:] == [51] and label == [2, 3] and again[2] == 70


def test_a_group_without_a_final_answer_is_not_judged_and_later_reflections_see_the_answer_alone():
    silent = verified([[0.0, 0.0], [0.0, 0.0]])
    tokens = silent.rollouts.tokens.at[0, :, 1].set(0)
    silent = dataclasses.replace(silent, rollouts=dataclasses.replace(silent.rollouts, tokens=tokens))
    judged, full, short = made(None, batch=silent)
    assert judged[0][:3] == [2, 3, 50] and judged[2] == 1 and full[2] == 0 and short[2] == 1
    assert len(full[0]) == 7 and short[0][:3] == [2, 3, 70] and short[0][3] in (30, 31) and short[0][4:] == [71]


def test_rows_that_do_not_count_make_no_task_and_there_are_at_most_so_many():
    assert made(None, batch=verified([[1.0, 0.0]], keep=[[False, False]])) == []
    ((context, label, _),) = made(None, batch=verified([[0.0, 1.0]], keep=[[False, True]]))
    assert context == [0, 1, 50, 31, 51] and label == [1]
    found = made([[0.0, 1.0]] * 5, most=2)
    assert len(found) == 4 and [x[1] == [] for x in found] == [False, False, True, True]
    assert {x[2] for x in made([[0.0, 1.0]] * 5, most=2, key=1)} != {x[2] for x in found}


def test_the_final_answer_follows_the_last_marker():
    tokens = jnp.array([[7, 8, 1, 7, 8, 2], [7, 8, 1, 2, 7, 8], [8, 7, 7, 8, 5, 0], [1, 2, 3, 4, 5, 6]])
    mask = jnp.ones((4, 6), bool).at[2, 5].set(False)
    want = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    np.testing.assert_array_equal(after(tokens, mask, marker=(7, 8)), want)
    np.testing.assert_array_equal(after(tokens, mask), mask)
    # A marker that is half padding is none.
    np.testing.assert_array_equal(after(tokens, mask.at[1, 5].set(False), marker=(7, 8))[1], [0, 0, 1, 1, 1, 0])


def test_a_judge_says_the_label_and_at_most_the_end_after_it():
    tokens = jnp.array([[4, 2, 3, 0], [4, 2, 3, 9], [4, 2, 9, 9], [2, 3, 9, 9], [4, 4, 4, 2]])
    mask = jnp.array([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool)
    got = says(tokens, mask, jnp.array([2, 3]), jnp.array(2))
    np.testing.assert_array_equal(got, [True, True, False, False, False])


def test_a_queue_gives_the_oldest_and_keeps_the_rest():
    queue = empty({"x": jnp.zeros((3, 2), jnp.int32)}, 4)
    items = {"x": jnp.array([[1, 1], [2, 2], [3, 3]], jnp.int32)}
    queue = push(queue, items, jnp.array([True, False, True]))
    queue = push(queue, jax.tree.map(lambda x: 10 * x, items), jnp.array([True, True, True]))
    oldest, left = pop(queue, 2, where=jnp.array(True))
    assert oldest["x"][:, 0].tolist() == [1, 3]
    assert left[0]["x"][: int(left[1]), 0].tolist() == [10, 20]  # there was no place for the last
    _, same = pop(queue, 2, where=jnp.array(False))
    assert same[0]["x"][: int(same[1]), 0].tolist() == [1, 3, 10, 20]


class FakeLearn:
    """Counts optimiser steps, and notes the batches it was given."""

    def __init__(self, fake):
        self.fake, self.batches = fake, []

    def __call__(self, models, batch):
        self.batches.append(batch)
        return models + 1, {"loss": jnp.float32(batch.outcome.sum())}

    def world(self, models):
        return self.fake.world()

    def batch(self, models, rollouts):
        return batch_of(rollouts, rollouts.outcome, jnp.zeros((), jnp.int32))[0]


def test_the_second_update_waits_until_there_are_enough_tasks():
    recipe = load("spark", group_size=2, size=4, words=WORDS._replace(right=(10,), wrong=(11,)), pointwise=1.0)
    fake = Fake([jnp.full((4, 2), 0.25)])
    learn = FakeLearn(fake)
    start = verified([[1.0, 0.0]])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), start.prompts)
    sampling = Sampling(temperature=jnp.ones(()))
    problem = Problem(rows=1, prompts=1, length=3, vocab=99, params={}, example=shapes, sampling=sampling)
    queue, steps = recipe.update.init(problem), []
    with jax.disable_jit():
        for _ in range(2):
            (models, metrics), queue = recipe.update.apply(queue, jax.random.key(0), jnp.int32(0), start, learn)
            steps.append((int(models), int(queue[1])))
    # One judgement and one reflection a step: four after two.
    assert steps == [(1, 2), (2, 0)]
    auxiliary = learn.batches[-1]
    assert auxiliary.outcome.shape == (4, 2) and auxiliary.advantage.shape == (4, 2, 3)
    kinds = [context[2] for context in (text(auxiliary.rollouts.context, i, 0) for i in range(4))]
    assert kinds == [50, 70, 50, 70]
    # The responses say 10 and 11: one of them is a judge's label. The verifier has the word where there is none.
    np.testing.assert_array_equal(auxiliary.outcome[::2].sum(-1), [1.0, 1.0])
    np.testing.assert_array_equal(auxiliary.outcome[1::2], 0.25 * jnp.ones((2, 2)))
    labels = np.where(auxiliary.outcome[::2, 0] == 1.0, 20, 21)  # row 0 was right, row 1 was not
    np.testing.assert_array_equal([text(auxiliary.rollouts.context, i, 0)[3] for i in (0, 2)], labels)
    np.testing.assert_allclose(auxiliary.advantage[::2, :, 0].sum(-1), 0.0, atol=1e-6)
    assert auxiliary.advantage[::2, :, 0].all() and not auxiliary.advantage[1::2].any()
    np.testing.assert_allclose(metrics["judging/outcome"], 0.375)


def test_spark_without_tasks_is_grpo_and_its_labels_differ():
    assert changes(load("spark", size=0), load("grpo", kl=0.001)) == {}
    assert set(changes(load("spark"), load("grpo", kl=0.001))) == {"update"}
    with pytest.raises(ValueError, match="size must be even"):
        load("spark", size=3)
    with pytest.raises(ValueError, match="differ by pairs"):
        load("spark", words=WORDS._replace(first=(5,)))


# --- xrpo -------------------------------------------------------------------------------------------------------------


def test_what_one_more_rollout_takes_off_the_interval():
    np.testing.assert_allclose(two_sided(0.05, jnp.array([1.0, 3.0, 7.0])), [12.7062, 3.182446, 2.364624], rtol=1e-5)
    gain = gains(0.05, largest=8)
    np.testing.assert_allclose(0.5 * gain[jnp.array([4, 8])], [0.174780, 0.033676], atol=2e-6)
    half = 0.5 * two_sided(0.05, jnp.array([3.0, 7.0])) / jnp.sqrt(jnp.array([4.0, 8.0]))
    np.testing.assert_allclose(half, [0.795612, 0.418010], atol=2e-6)
    assert gain.shape == (9,) and not gain[:2].any() and (jnp.diff(gain[2:]) < 0).all()


def test_rollouts_go_where_the_mean_is_most_uncertain():
    gain, asked = gains(0.05, largest=16), jnp.full(3, 4, jnp.int32)
    give = partial(greedy, gain=gain, most=4)
    # Gains of s = 0.5: 0.175, 0.102 (n = 5), 0.067, 0.046; of 0.2: 0.070, 0.041.
    np.testing.assert_array_equal(give(jnp.array([0.5, 0.0, 0.2]), asked, budget=3, bonus=0.0), [2, 0, 1])
    np.testing.assert_array_equal(give(jnp.array([0.5, 0.0, 0.2]), asked, budget=9, bonus=0.0), [4, 1, 4])
    # Nothing but the bonus: to whoever was asked least.
    np.testing.assert_array_equal(give(jnp.zeros(3), jnp.array([4, 2, 3]), budget=3, bonus=1.0), [0, 2, 1])
    np.testing.assert_array_equal(give(jnp.array([0.5, 0.0, 0.2]), asked, budget=3, bonus=100.0), [1, 1, 1])


def two_rounds():
    """Prompt 0 is mixed, prompt 1 all wrong; with as many as possible for the mixed one."""
    later = [jnp.array([[1.0, 0.0], [1.0, 1.0]]), jnp.array([[0.0, 1.0], [0.0, jnp.nan]])]
    fake, contexts = Fake([jnp.array([[1.0, 0.0], [0.0, 0.0]]), *later]), []

    def context(first):
        contexts.append(first.outcome)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 1)))[:, :, :3], first.context)

    with jax.disable_jit():
        got = sample_in_rounds(
            fake.world(),
            jax.random.key(0),
            toy_prompts(2),
            base=2,
            rounds=2,
            mean=1,
            most=2,
            alpha=0.05,
            bonus=0.0,
            context=context,
        )
    return got, fake, contexts


def test_groups_grow_in_rounds_and_rows_not_asked_have_no_token():
    got, fake, (seen,) = two_rounds()
    np.testing.assert_array_equal(seen, [[1.0, 0.0], [0.0, 0.0]])
    assert got.tokens.shape == (2, 6, T) and got.context.tokens.shape == (2, 3, 3)
    # Round one: all to the mixed prompt. Round two: prompt 1, whose rows were not asked, has still no deviation.
    np.testing.assert_array_equal(got.mask.any(-1), [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(got.tokens[0, :, 0], [10, 11, 20, 21, 30, 31])
    np.testing.assert_array_equal(got.outcome[0], [1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    assert [None if c is None else c.tokens.shape for c in fake.contexts] == [None, (2, 1, 3), (2, 1, 3)]


def test_a_corpus_takes_the_first_right_response_of_prompts_it_does_not_know():
    prompts = dataclasses.replace(toy_prompts(4), index=jnp.array([5, 6, 5, 7]))
    problem = Problem(rows=9, prompts=4, length=3, vocab=99, params={}, example=prompts)
    embed = partial(token_counts, width=64)
    corpus = empty_corpus(problem, places=4, embed=embed)
    batch = verified([[0.0, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 0.0]], keep=[[True, True]] * 3 + [[True, False]])
    batch = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, prompts=prompts))
    corpus = with_solved(corpus, batch, embed=embed)
    assert corpus["index"].tolist() == [5, 7, -1, -1] and int(corpus["next"]) == 2
    assert corpus["tokens"][:2].tolist() == [[21, 9, 31], [20, 9, 30]]
    assert corpus["context"].tokens[:2].tolist() == [[0, 1], [6, 7]]
    again = with_solved(corpus, batch, embed=embed)
    jax.tree.map(np.testing.assert_array_equal, again, corpus)
    other = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, prompts=toy_prompts(4)))
    full = with_solved(with_solved(corpus, other, embed=embed), batch, embed=embed)
    # Prompts 0, 2 and 3 take two free places and that of the oldest, prompt 5; which then takes that of prompt 7.
    assert full["index"].tolist() == [3, 5, 0, 2] and int(full["next"]) == 2
    with pytest.raises(ValueError, match="a place for each of the 4 prompts"):
        empty_corpus(problem, places=3, embed=embed)


def test_the_most_similar_solved_questions_come_before_a_question_that_failed():
    embed = partial(token_counts, width=64)
    context = Context(tokens=jnp.array([[1, 2], [1, 1], [4, 9], [0, 0]]), mask=jnp.array([[1, 1]] * 3 + [[0, 0]], bool))
    corpus = {
        "context": context,
        "tokens": jnp.array([[11, 0], [12, 0], [13, 14], [15, 0]]),
        "mask": jnp.array([[1, 0], [1, 0], [1, 1], [1, 1]], bool),
        "embedding": embed(context),
        "index": jnp.array([0, 1, 2, -1]),
        "next": jnp.int32(3),
    }
    questions = Context(tokens=jnp.array([[1, 3], [9, 4], [1, 2]]), mask=jnp.ones((3, 2), bool))
    asked = dataclasses.replace(toy_prompts(3), context=questions)
    got = with_examples(corpus, asked, jnp.array([True, True, False]), count=2, embed=embed, between=(77,))
    assert text(got, 0, 0) == [1, 1, 12, 77, 1, 2, 11, 77, 1, 3]
    assert text(got, 1, 0)[:5] == [4, 9, 13, 14, 77] and text(got, 1, 0)[-2:] == [9, 4]
    assert text(got, 2, 0) == [1, 2] and got.tokens.shape == (3, 1, 12)
    few = with_examples({**corpus, "index": jnp.array([0, -1, -1, -1])}, asked, jnp.ones(3, bool), count=2, embed=embed)
    assert text(few, 1, 0) == [1, 2, 11, 9, 4]
    none = with_examples(corpus, asked, jnp.ones(3, bool), count=0, embed=embed)
    np.testing.assert_array_equal(none.tokens[:, 0], asked.context.tokens)


def test_only_groups_without_a_right_row_get_examples():
    first = toy_batch(logp=jnp.zeros((4, 2, T))).rollouts
    outcome = jnp.array([[0.0, 0.0], [0.0, 1.0], [jnp.nan, 0.0], [jnp.nan, jnp.nan]])
    asked = []

    def examples(corpus, prompts, where, **_):
        asked.append(where.tolist())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xrpo, "with_examples", examples)
        xrpo.examples_if_failed({}, None, dataclasses.replace(first, outcome=outcome), count=1, embed=None, between=())
    assert asked == [[True, False, True, False]]


def rare(fill=0.0):
    mean = jnp.array([-0.2, -0.6, -0.4, -0.4])[:, None]
    logp = jnp.concatenate([mean + 0.1, mean - 0.1, jnp.full((4, 1), fill)], axis=-1)[None]
    mask = jnp.broadcast_to(jnp.array([True, True, False]), (1, 4, 3))
    return toy_batch(logp=logp, mask=mask, outcome=[[1.0, 1.0, 0.0, 0.0]], advantage=[[1.0, 1.0, -1.0, -1.0]])


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_unlikely_right_rows_get_more(fill):
    got = sharpened(rare(fill), weight=2.5, most=0.5)
    np.testing.assert_allclose(got[0, :, 0], [1.0, 1.453173, -1.0, -1.0], atol=1e-6)
    np.testing.assert_array_equal(got[0, :, 1], got[0, :, 0])
    np.testing.assert_allclose(sharpened(rare(fill), weight=25.0, most=0.5)[0, 1, 0], 1.5)


def test_xrpo_without_its_parts_is_grpo():
    plain = {"group_size": 4, "base": 4, "rounds": 0}
    scores, batch = random_batch(jax.random.key(4))
    assert_equal_losses(load("xrpo", **plain, sharpen=0.0), load("grpo", kl=None), scores, batch)
    with pytest.raises(AssertionError):
        assert_equal_losses(load("xrpo", **plain), load("grpo", kl=None), scores, batch)
    fake = Fake([jnp.zeros((2, 4))])
    got, _ = load("xrpo", **plain).rollout.apply({}, jax.random.key(0), fake.world(), toy_prompts(2))
    assert got.tokens.shape == (2, 4, T) and len(fake.contexts) == 1
    for wrong in ({"base": 1}, {"rounds": 0}, {"rounds": 3}, {"most": 3}, {"group_size": 4}):
        with pytest.raises(ValueError, match="xrpo needs base"):
            load("xrpo", **wrong)


# --- clpo -------------------------------------------------------------------------------------------------------------


def test_difficulty_by_accuracy():
    outcome = jnp.array([[0.0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 0]])
    scored = jnp.ones((6, 4), bool).at[5].set(jnp.array([True, True, False, False]))
    of = partial(difficulty, hard=0.3, medium=0.7)
    np.testing.assert_array_equal(of(outcome, scored), [HARD, HARD, MEDIUM, EASY, EASY, MEDIUM])
    np.testing.assert_array_equal(of(outcome, jnp.zeros((6, 4), bool)), [EASY] * 6)
    ten = (jnp.arange(10) < jnp.array([[3], [4], [7], [8]])).astype(float)
    np.testing.assert_array_equal(of(ten, jnp.ones((4, 10), bool)), [HARD, MEDIUM, MEDIUM, EASY])


def worded(outcomes, **options):
    """Prompts 0 (hard), 1 (medium) and 2 (easy), answered, rewritten as `[20]` and answered again."""
    fake = Fake(outcomes)
    words = {"simplify": (51,), "paraphrase": (52, 53), "frame": ((60,), (61, 62))}
    recipe = load("clpo", group_size=4, length=T, **words, **options)
    return recipe.rollout(fake.world(), jax.random.key(0), logged(toy_prompts(3))), fake


LEVELS = [[1.0, 0, 0, 0], [1.0, 1, 0, 0], [1.0, 1, 1, 1]]


def test_hard_and_medium_prompts_are_worded_anew_with_the_same_answer():
    got, fake = worded([LEVELS, jnp.ones((3, 4))])
    _, asked, context = fake.contexts
    # Question, answer, instruction; and what the policy wrote, without its end, as the new prompt.
    assert [text(asked, b, 0) for b in (0, 1)] == [[0, 1, 80, 51], [2, 3, 81, 52, 53]]
    assert [text(context, b, 0) for b in range(3)] == [[60, 20, 61, 62]] * 2 + [[4, 5]]
    assert got.tokens.shape == (6, 4, T) and got.context.tokens.shape[:2] == (6, 1)
    assert [text(got.context, b, 0) for b in (0, 3, 5)] == [[0, 1], [60, 20, 61, 62], [4, 5]]
    np.testing.assert_array_equal(got.prompts.index, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(got.prompts.target, [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(got.mask.any((1, 2)), [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(got.segment[:, 0, 0], [HARD, MEDIUM, EASY] * 2)
    np.testing.assert_array_equal(got.outcome[:3], LEVELS)
    np.testing.assert_array_equal(got.outcome[3:5], jnp.ones((2, 4)))
    # Two tokens a response; two more for each rewrite that was asked for.
    np.testing.assert_array_equal(got.generated, [10, 10, 8, 8, 8, 0])


@pytest.mark.parametrize(("kind", "there"), [("rewrite_hard", [0, 1, 0]), ("rewrite_medium", [1, 0, 0])])
def test_one_kind_may_stay_as_it_is(kind, there):
    got, fake = worded([LEVELS, jnp.ones((3, 4))], **{kind: False})
    np.testing.assert_array_equal(got.mask[3:].any((1, 2)), there)
    assert text(fake.contexts[2], 1 - there[1], 0) == [2 - 2 * there[1], 3 - 2 * there[1]]


def test_hard_rows_are_held_less():
    scores, batch = random_batch(jax.random.key(2))
    term = load("clpo").loss.terms[0]
    plain = kl_to_reference(scores, batch, weight=1.0)
    # Prompt 0 as it was was hard, the others not, whatever the outcomes here are.
    level = jnp.broadcast_to(jnp.array([HARD, MEDIUM, EASY])[:, None, None], batch.mask.shape)
    marked = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, segment=level))
    coefficient = np.array([0.0005, 0.001, 0.001])[:, None, None]
    np.testing.assert_allclose(term(scores, marked), coefficient * plain, rtol=1e-6)
    # Without rewriting the group itself says it.
    outcome = jnp.zeros((3, 4)).at[1].set(1.0)
    unmarked = term(scores, dataclasses.replace(batch, outcome=outcome))
    np.testing.assert_allclose(unmarked, np.array([0.0005, 0.001, 0.0005])[:, None, None] * plain, rtol=1e-6)


def test_informative_groups_count_or_all():
    batch = toy_batch(logp=jnp.zeros((3, 2, 1)), outcome=[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    np.testing.assert_array_equal(informative_or_all(batch), [[1, 1], [0, 0], [0, 0]])
    assert informative_or_all(dataclasses.replace(batch, outcome=jnp.ones((3, 2)))).all()


def test_clpo_without_rewriting_is_filtered_grpo():
    scores, batch = random_batch(jax.random.key(4))
    child = load("clpo", rewrite_hard=False, rewrite_medium=False, hard_kl=1.0)
    parent = dataclasses.replace(load("grpo", kl=0.001), filter=informative)
    assert_equal_losses(child, parent, scores, batch)
    assert set(changes(child, dataclasses.replace(parent, rollout=partial(sample_group, size=4)))) == {
        "filter",
        "loss.terms[0]",
        "update",
    }
    with pytest.raises(AssertionError):
        assert_equal_losses(load("clpo", hard=0.9, hard_kl=0.0), parent, scores, batch)


# --- the policy elsewhere, in the engine ------------------------------------------------------------------------------


def test_the_policy_is_scored_elsewhere_with_its_gradient(policy, letters):
    """Where the other context is the same one, its log-probs and their gradient are the policy's own."""
    recipe = load("papo", group_size=1, kl=None)  # one row a group: no advantage, so that the terms are alone
    terms = tuple(partial(double_entropy, weight=1.0, through=through) for through in (True, False))
    recipe = dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, terms=terms))

    def metrics(share, through, apart, accumulate=1):
        parts = learner(recipe, policy=policy, task=letters, prompts_per_step=2, accumulate=accumulate)
        state = parts.init(jax.random.key(0))
        assert set(state.params) == {"policy"}
        values = {"rollout.blank.share": share, "loss.terms[0].weight": through, "loss.terms[1].weight": apart}
        step = steps.setdefault(accumulate, jax.jit(parts.step))
        return step(adjust(state, numbers=values))[1]

    steps = {}
    same, alone = metrics(0.0, 1.0, 0.0), metrics(0.0, 0.0, 1.0)
    np.testing.assert_allclose(same["loss"], alone["loss"], rtol=1e-5)
    np.testing.assert_allclose(same["loss"], 2 * float(np.log(64)), rtol=0.2)
    np.testing.assert_allclose(same["grad_norm"], 2 * alone["grad_norm"], rtol=1e-4)
    whole, parted = metrics(1.0, 1.0, 0.0), metrics(1.0, 1.0, 0.0, accumulate=2)
    np.testing.assert_allclose(parted["grad_norm"], whole["grad_norm"], rtol=1e-4)
    assert abs(float(whole["loss"] - same["loss"])) > 1e-5
