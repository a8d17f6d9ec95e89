"""Where one method becomes another: equal in value and in the gradient by every token's log-prob."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.basic import raw, uniform
from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithms import load
from jaxrl_llm.filters.basic import correct, everything
from jaxrl_llm.losses.aggregate import group_mean_token_mean, sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.surrogates import clip_min, dual_clip, log_likelihood, unclipped
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.testing import evaluate, prepare, random_batch
from jaxrl_llm.types import Scores

CLIP = partial(clip_min, low=0.2, high=0.2)


def change(name, *, kwargs=None, loss=None, **slots):
    """A method with other arguments and slots; `loss` are fields of its PolicyLoss."""
    parent = load(name, **(kwargs or {}))
    return dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, **(loss or {})), **slots)


def reinforce(advantage, aggregate):
    return change("reinforce", advantage=advantage, loss={"aggregate": aggregate})


GRPO = load("grpo", kl=None)

# child, parent, where: "off" the old policy, "on" it, "short": off it with rows of one token.
EQUAL = {
    "gspo at one token is grpo": (load("gspo", clip_low=0.2, clip_high=0.2), GRPO, "short"),
    "gspo_token at one token is grpo": (load("gspo_token", clip_low=0.2, clip_high=0.2), GRPO, "short"),
    "gspo_token is gspo": (
        load("gspo_token", clip_low=0.1, clip_high=0.1),
        load("gspo", clip_low=0.1, clip_high=0.1),
        "off",
    ),
    "dapo is grpo": (
        change("dapo", kwargs={"clip_high": 0.2}, filter=everything, reward=verified),
        change("grpo", kwargs={"kl": None}, loss={"aggregate": token_mean}),
        "off",
    ),
    "dual clip without bound is clip": (
        change("grpo", loss={"surrogate": partial(dual_clip, low=0.2, high=0.2, bound=jnp.inf)}),
        load("grpo"),
        "off",
    ),
    "clip without bounds is importance sampling": (
        change("grpo", loss={"surrogate": partial(clip_min, low=jnp.inf, high=jnp.inf)}),
        change("grpo", loss={"surrogate": unclipped}),
        "off",
    ),
    "grpo without divergence is the weight 0": (load("grpo", kl=jnp.array(0.0)), GRPO, "off"),
    "grpo at the reference has no divergence": (load("grpo"), GRPO, "on reference"),
    "rloo without divergence is the weight 0": (load("rloo", kl=jnp.array(0.0)), load("rloo", kl=None), "off"),
    "dr_grpo with std and length is grpo": (
        change("dr_grpo", advantage=GRPO.advantage, loss={"aggregate": sequence_mean_token_mean}),
        GRPO,
        "off",
    ),
    "ppo without a critic is reinforce_pp": (
        load("ppo", lam=1.0, value_weight=0.0),
        load("reinforce_pp", kl=None),
        "no critic",
    ),
    "reinforce_pp_baseline is centred ppo": (
        load("reinforce_pp_baseline", kl=None),
        change("reinforce_pp", kwargs={"kl": None}, advantage=load("reinforce_pp_baseline").advantage),
        "off",
    ),
    "sft is reinforce with A = 1": (load("sft"), reinforce(uniform, token_mean), "off"),
    "rft without repeats is reinforce on the correct": (
        load("rft"),
        change("reinforce", advantage=raw, filter=correct, loss={"aggregate": token_mean}),
        "off",
    ),
    "reinforce with rloo's advantage is rloo": (
        change("reinforce", advantage=load("rloo").advantage),
        load("rloo", kl=None),
        "off",
    ),
}

# child, parent, factor: on the old policy the child's gradient is `factor` times the parent's.
PROPORTIONAL = {
    "grpo": (GRPO, reinforce(GRPO.advantage, sequence_mean_token_mean), 1.0),
    "grpo, centred": (
        dataclasses.replace(GRPO, advantage=partial(per_group, center)),
        reinforce(partial(per_group, center), sequence_mean_token_mean),
        1.0,
    ),
    "gspo": (load("gspo"), reinforce(GRPO.advantage, sequence_mean_token_mean), 1.0),
    "gspo_token": (load("gspo_token"), reinforce(GRPO.advantage, sequence_mean_token_mean), 1.0),
    "cispo": (load("cispo"), reinforce(GRPO.advantage, group_mean_token_mean), 1.0),
    "reinforce_pp_baseline": (
        load("reinforce_pp_baseline", kl=None),
        reinforce(load("reinforce_pp_baseline").advantage, token_mean),
        1.0,
    ),
    "dr_grpo": (load("dr_grpo"), load("rloo", kl=None), (4 - 1) / (4 * 5)),
}


def data(where):
    scores, batch = random_batch(jax.random.key(11), length=1 if where == "short" else 5)
    if where == "full":  # every row is there, so that every group has G rows
        scores, batch = random_batch(jax.random.key(11))
        rollouts = dataclasses.replace(batch.rollouts, mask=jnp.ones_like(batch.rollouts.mask))
        batch = dataclasses.replace(batch, keep=jnp.ones_like(batch.keep), rollouts=rollouts)
    if where == "on reference":
        scores = Scores(logp=batch.reference.logp)
    if where == "no critic":
        zero = jnp.zeros_like(batch.value)
        batch, scores = dataclasses.replace(batch, value=zero), dataclasses.replace(scores, value=zero)
    return scores, batch


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return got.value, got.coefficient / jnp.maximum(batch.mask.sum(), 1)


@pytest.mark.parametrize("name", EQUAL)
def test_equal(name):
    child, parent, where = EQUAL[name]
    (value, gradient), (want, want_gradient) = (run(a, *data(where)) for a in (child, parent))
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    assert (gradient != 0).any()


@pytest.mark.parametrize("name", PROPORTIONAL)
def test_proportional_on_the_old_policy(name):
    child, parent, factor = PROPORTIONAL[name]
    _, batch = data("full")
    at = Scores(logp=batch.rollouts.logp)
    gradient, want = run(child, at, batch)[1], run(parent, at, batch)[1]
    np.testing.assert_allclose(gradient, factor * want, rtol=1e-4, atol=1e-7)
    assert (gradient != 0).any()


def test_dpo_at_the_reference_is_reinforce_on_pairs():
    _, batch = data("full")
    algorithm = load("dpo", beta=0.3)
    prepared = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, Scores(logp=batch.reference.logp), prepared)
    np.testing.assert_allclose(got.value, np.log(2), rtol=1e-5)
    pairs = prepared.keep.any(-1).sum()
    sign = jnp.where(prepared.mask, 2 * prepared.outcome[..., None] - 1, 0)
    want = -0.3 / 2 * sign / pairs
    np.testing.assert_allclose(got.coefficient / prepared.mask.sum(), want, rtol=1e-4)


def test_limits_are_not_trivial():
    """The same comparisons off their limit differ, so they can fail."""
    scores, batch = data("off")
    for child, parent in [
        (load("gspo", clip_low=0.2, clip_high=0.2), GRPO),
        (load("dapo"), GRPO),
        (load("ppo"), load("reinforce_pp", kl=None)),
        (load("grpo"), GRPO),
        (change("grpo", loss={"surrogate": partial(dual_clip, bound=1.05)}), load("grpo")),
        (change("grpo", loss={"surrogate": log_likelihood}), load("grpo")),
        (load("rloo"), load("rloo", kl=None)),
        (load("dr_grpo"), GRPO),
    ]:
        assert not np.allclose(run(child, scores, batch)[1], run(parent, scores, batch)[1], rtol=1e-3, atol=1e-6)


def test_baselines_that_ignore_the_action_keep_the_expected_gradient():
    """Enumerated over three actions; and the gradient is that of the expected reward."""
    logits, reward = jnp.array([0.2, -0.4, 0.7]), jnp.array([1.0, 0.0, 3.0])

    def surrogate(logits, baseline):
        logp = jax.nn.log_softmax(logits)
        pi = jax.lax.stop_gradient(jnp.exp(logp))
        return jnp.sum(pi * log_likelihood(jnp.ones(3), reward - baseline, logp))

    want = jax.grad(lambda l: -jnp.sum(jax.nn.softmax(l) * reward))(logits)
    for baseline in (0.0, 1.7, -3.0):
        np.testing.assert_allclose(jax.grad(surrogate)(logits, baseline), want, atol=1e-6)
