"""Methods that read one response under two contexts: critiques, privileged teachers, corrupted prompts."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.adjust import adjust
from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.critique_grpo import right_answer, sample_and_refine, verdict
from jaxrl_llm.algorithms.opsd import with_solution_for_teacher
from jaxrl_llm.algorithms.papo import double_entropy, with_blanks
from jaxrl_llm.engine import learner
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.divergence import at_top, forward_kl, from_teacher, jensen_shannon, reverse_kl
from jaxrl_llm.losses.shaped import shaped, shaped_ratio
from jaxrl_llm.losses.surrogates import clip_min, unclipped
from jaxrl_llm.prompts.blank import blanked
from jaxrl_llm.prompts.solution import solution
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.inject import best_row, injected, with_row
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_batch, toy_prompts, toy_rows
from jaxrl_llm.types import INJECTED, PADDING, POLICY, Context, Logged, Scores, World
from jaxrl_llm.updates.reference import averaged_reference

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

    def sample(self, key, prompts, size, context=None, **_):
        self.contexts.append(context)
        b = prompts.index.shape[0]
        mask = jnp.broadcast_to(jnp.array([True, True, False]), (b, size, T))
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
