"""Responses that take more than one step are the responses of one step, token for token rescored."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rollouts.resume import buffer, resume, unfinished, unstarted
from jaxrl_llm.testing import toy_world
from jaxrl_llm.types import PADDING, POLICY, Problem, Sampling

B, G, T, ENDS = 3, 4, 8, range(20, 30)
SAMPLING = Sampling(temperature=jnp.array(0.8), top_p=jnp.array(0.95))


@pytest.fixture(scope="module")
def params(policy):
    return policy.init(jax.random.key(0))


@pytest.fixture(scope="module")
def prompts(letters):
    return letters.draw(jax.random.key(4), B)


@pytest.fixture(scope="module")
def world(policy, letters, params):
    """Every sixth token ends a response, and so does 13, 14; `world(step)` samples as that step's policy."""
    task = dataclasses.replace(letters, stop=(*((i,) for i in ENDS), (13, 14)))
    return lambda step=0: toy_world(policy, task, params, length=T, step=step, sampling=SAMPLING)


def begin(world, prompts, size=G):
    return unstarted(prompts, world().sampling, size=size, length=T)


@pytest.fixture(scope="module")
def interrupted(world, prompts):
    return jax.jit(lambda k: resume(world(), k, begin(world, prompts), window=3))(jax.random.key(1))


@pytest.fixture(scope="module")
def whole(world, interrupted):
    return jax.jit(lambda k, x: resume(world(7), k, x))(jax.random.key(2), interrupted)


FIELDS = ("tokens", "mask", "role", "logp", "entropy", "version")


def test_a_window_limits_new_tokens(interrupted):
    had = np.asarray(interrupted.attended.sum(-1))
    assert (had[np.asarray(unfinished(interrupted))] == 3).all() and (had <= 3).all()
    assert unfinished(interrupted).any()
    np.testing.assert_array_equal(unfinished(interrupted), interrupted.truncated)


def test_earlier_tokens_are_kept_and_new_ones_follow(interrupted, whole):
    before, had = np.asarray(interrupted.attended), np.asarray(interrupted.attended.sum(-1))
    for name in FIELDS:
        np.testing.assert_array_equal(
            np.where(before, getattr(whole, name), 0), np.where(before, getattr(interrupted, name), 0)
        )
    length = np.asarray(whole.attended.sum(-1))
    np.testing.assert_array_equal(whole.attended, np.arange(T) < length[..., None])
    np.testing.assert_array_equal(whole.role, np.where(whole.mask, POLICY, PADDING))
    assert (length[np.asarray(interrupted.truncated)] > 3).all() and not unfinished(whole).any()
    np.testing.assert_array_equal(np.where(whole.mask, whole.version, 0), np.where(before | ~whole.mask, 0, 7))
    assert (length[~np.asarray(interrupted.truncated)] == had[~np.asarray(interrupted.truncated)]).all()


def test_log_probs_are_those_of_the_whole_response(world, whole):
    scores = jax.jit(lambda x: world().score("policy", x))(whole)
    np.testing.assert_allclose(np.where(whole.mask, scores.logp, 0), whole.logp, atol=1e-5)
    np.testing.assert_allclose(np.where(whole.mask, scores.entropy, 0), whole.entropy, atol=1e-5)
    assert whole.mask.sum() > B * G * 3


def test_rows_that_ended_are_not_touched(world, interrupted):
    end = (jnp.arange(B * G).reshape(B, G) % 2 == 0) | ~interrupted.truncated
    ended = dataclasses.replace(interrupted, truncated=~end)
    got = jax.jit(lambda k, x: resume(world(3), k, x, window=2))(jax.random.key(5), ended)
    for name in (*FIELDS, "truncated"):
        new, old = getattr(got, name), getattr(ended, name)
        np.testing.assert_array_equal(new[end], old[end], err_msg=name)
    assert (got.attended.sum(-1)[~end] > 3).all() and (got.attended.sum(-1)[~end] <= 5).all()


def test_the_budget_ends_a_row_for_good(world, prompts):
    begun = begin(world, prompts)
    full = dataclasses.replace(
        begun, tokens=begun.tokens + 20, mask=~begun.mask, role=jnp.full_like(begun.role, POLICY)
    )
    assert not unfinished(full).any() and unfinished(begun).all()
    got = resume(world(), jax.random.key(0), full)
    jax.tree.map(np.testing.assert_array_equal, got, full)


def test_rows_that_share_their_beginning_are_continued_as_if_they_did_not(world, interrupted):
    pairs = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=1) if x.shape[:2] == (B, G) else x, interrupted)
    key = jax.random.key(6)
    plain = jax.jit(lambda k, x: resume(world(), k, x, window=2))(key, pairs)
    shared = jax.jit(lambda k, x: resume(world(), k, x, window=2, shared=2, longest=3))(key, pairs)
    for name in (*FIELDS, "truncated"):
        np.testing.assert_allclose(getattr(shared, name), getattr(plain, name), atol=1e-5, err_msg=name)
    tokens = np.asarray(shared.tokens).reshape(B, G, 2, T)
    assert (tokens[:, :, 0] != tokens[:, :, 1]).any() and (tokens[:, :, 0, :3] == tokens[:, :, 1, :3]).all()


def test_a_stop_sequence_across_an_interruption_ends_the_row(world, prompts, letters):
    """A row that holds 13 and gets 14 has ended."""
    eos = letters.tokenizer.eos_token_id
    one = begin(world, prompts, size=1)
    first = jnp.arange(T) == 0
    holding = dataclasses.replace(
        one, tokens=jnp.where(first, 13, 0) + one.tokens, mask=first | one.mask, role=jnp.where(first, POLICY, one.role)
    )
    many = jax.tree.map(lambda x: jnp.repeat(x, 256, axis=1) if x.shape[:2] == (B, 1) else x, holding)
    many = dataclasses.replace(many, context=one.context, prompts=one.prompts)
    got = jax.jit(lambda k: resume(world(), k, many, window=1, shared=256))(jax.random.key(1))
    ends = np.isin(got.tokens[..., 1], [*ENDS, 14, eos])
    assert (np.asarray(got.tokens[..., 1]) == 14).any()
    np.testing.assert_array_equal(got.truncated, ~ends)


def test_room_between_steps_is_of_the_shapes_of_a_step(prompts):
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), prompts)
    problem = Problem(rows=9, prompts=B, length=T, vocab=3, params={}, example=example, sampling=SAMPLING)
    room = buffer(problem, groups=2, size=G)
    want = unstarted(jax.tree.map(lambda x: x[:2], prompts), SAMPLING, size=G, length=T)

    def kind(x):
        return (x.shape, x.dtype)

    assert jax.tree.map(kind, room) == jax.tree.map(kind, want)
    assert unfinished(room).all() and not room.attended.any()
