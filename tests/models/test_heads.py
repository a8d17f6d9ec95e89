"""Critics and reward models."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.heads import critic, hidden_states, reward_model, value_head
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.types import POLICY, Context, Prompts, Rollouts, Sampling

B, G, S, T, V = 2, 2, 4, 3, 13
MODEL = transformer(
    TransformerConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
)


def rollouts_of(tokens=None, attended=None, contexts=1):
    keys = jax.random.split(jax.random.key(3), 2)
    context = Context(tokens=jax.random.randint(keys[0], (B, S), 0, V), mask=jnp.arange(S) < jnp.array([4, 2])[:, None])
    tokens = jax.random.randint(keys[1], (B, G, T), 0, V) if tokens is None else tokens
    if attended is None:
        attended = jnp.arange(T) < jnp.array([[3, 1], [2, 0]])[..., None]
    zeros = jnp.zeros(tokens.shape)
    return Rollouts(
        prompts=Prompts(context=context, index=jnp.arange(B), target=()),
        context=jax.tree.map(lambda x: jnp.repeat(x[:, None], contexts, axis=1), context),
        tokens=tokens,
        mask=attended,
        role=jnp.where(attended, POLICY, 0).astype(jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros(tokens.shape[:2], bool),
        sampling=Sampling(temperature=jnp.ones(tokens.shape[:2])),
    )


def with_random_head(params):
    return {**params, "head": {"kernel": jnp.arange(1.0, 9.0), "bias": jnp.asarray(0.5)}}


def test_values_start_at_zero_and_the_head_learns_at_once():
    for own in (critic(MODEL), reward_model(MODEL)):
        function = own.value if hasattr(own, "value") else own.reward
        params = jax.jit(own.init)(jax.random.key(0))
        total, gradient = jax.jit(jax.value_and_grad(lambda p, f=function: f(p, rollouts_of()).sum()))(params)
        assert float(total) == 0.0
        assert not jax.jit(function)(params, rollouts_of()).any()
        assert float(jnp.abs(gradient["head"]["kernel"]).max()) > 0
        assert all(not bool(x.any()) for x in jax.tree.leaves(gradient["trunk"])), "a zero head moves no trunk"


def test_a_head_on_the_policys_trunk_equals_one_with_a_copy_of_it():
    shared, own = value_head(MODEL.width), critic(MODEL)
    assert shared.shared and not own.shared
    params = with_random_head(jax.jit(own.init)(jax.random.key(0)))
    rollouts = rollouts_of()
    hidden = jax.jit(functools.partial(hidden_states, MODEL))(params["trunk"], rollouts)
    expected = jnp.where(rollouts.mask, shared.value(params["head"], hidden), 0.0)
    np.testing.assert_allclose(jax.jit(own.value)(params, rollouts), expected, atol=1e-6)
    assert jax.tree.map(jnp.shape, shared.init(jax.random.key(0))) == jax.tree.map(jnp.shape, params["head"])


def test_the_value_of_a_state_does_not_know_the_token_it_precedes():
    own = critic(MODEL)
    params = with_random_head(jax.jit(own.init)(jax.random.key(0)))
    rollouts = rollouts_of()
    changed = rollouts_of(tokens=rollouts.tokens.at[0, 0, 1].add(1) % V)
    before, after = (jax.jit(own.value)(params, x) for x in (rollouts, changed))
    np.testing.assert_allclose(after[0, 0, :2], before[0, 0, :2], atol=1e-6)
    assert abs(float(after[0, 0, 2] - before[0, 0, 2])) > 1e-4


def test_a_reward_reads_the_last_attended_token_and_nothing_after():
    rewards = reward_model(MODEL)
    params = with_random_head(jax.jit(rewards.init)(jax.random.key(0)))
    rollouts, reward = rollouts_of(), jax.jit(rewards.reward)
    before = np.asarray(reward(params, rollouts))
    for (b, g), length in np.ndenumerate(np.asarray(rollouts.attended.sum(-1))):
        if length < T:
            after = reward(params, rollouts_of(tokens=rollouts.tokens.at[b, g, length:].set(99)))
            np.testing.assert_array_equal(after, before)
        if length:
            changed = rollouts.tokens.at[b, g, length - 1].add(1) % V
            after = np.asarray(reward(params, rollouts_of(tokens=changed)))
            assert abs(after[b, g] - before[b, g]) > 1e-4


def test_a_reward_equals_the_head_on_the_whole_text():
    rewards = reward_model(MODEL)
    params = with_random_head(jax.jit(rewards.init)(jax.random.key(0)))
    rollouts = rollouts_of()
    found = jax.jit(rewards.reward)(params, rollouts)
    read = jax.jit(functools.partial(hidden_states, MODEL))
    for (b, g), length in np.ndenumerate(np.asarray(rollouts.attended.sum(-1))):
        n = int(rollouts.prompts.context.mask[b].sum())
        text = jnp.concatenate([rollouts.prompts.context.tokens[b, :n], rollouts.tokens[b, g, :length]])
        text = jnp.pad(text, (0, S + T - len(text)))[None, None]
        # As a context of its own: the first hidden state of any response follows the text's last token.
        whole = Rollouts(
            **{
                **vars(rollouts),
                "context": Context(tokens=text, mask=(jnp.arange(S + T) < n + length)[None, None]),
                "tokens": jnp.zeros((1, 1, 1), jnp.int32),
                "role": jnp.zeros((1, 1, 1), jnp.int8),
            }
        )
        expected = read(params["trunk"], whole)[0, 0, 0] @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(found[b, g], expected, rtol=1e-5, atol=1e-5)


def test_contexts_must_divide_the_group():
    with pytest.raises(ValueError, match=r"3 contexts for groups of 2"):
        hidden_states(MODEL, {}, rollouts_of(contexts=3))
