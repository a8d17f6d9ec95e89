"""Packed scores are the padded ones, and so are their gradients; a step that packs is the step that does not."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.engine import learner
from jaxrl_llm.models.packing import Room, needed, of_rollouts, packing, rooms
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model, score
from jaxrl_llm.types import POLICY, Context, Prompts, Rollouts, Sampling

M, R, S, T, V = 4, 2, 3, 6, 11
LENGTHS = jnp.array([[6, 1], [3, 0], [2, 2], [1, 4]])
FIELDS = frozenset({"logp", "entropy", "value", "mean_logp"})


@pytest.fixture(scope="module")
def model():
    return transformer(
        TransformerConfig(
            vocab_size=V,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=4,
        )
    )


@pytest.fixture(scope="module")
def params(model):
    params = model.init(jax.random.key(0))
    return {**params, "embed": 20 * params["embed"]}  # else all tokens are equally likely


def rollouts(*, contexts=1, fill=0):
    keys = jax.random.split(jax.random.key(3), 2)
    context = Context(
        tokens=jax.random.randint(keys[0], (M, S), 0, V), mask=jnp.arange(S) < jnp.array([3, 2, 1, 3])[:, None]
    )
    attended = jnp.arange(T) < LENGTHS[..., None]
    zeros = jnp.zeros((M, R, T))
    return Rollouts(
        prompts=Prompts(context=context, index=jnp.arange(M), target=()),
        context=jax.tree.map(lambda x: jnp.repeat(x[:, None], contexts, axis=1), context),
        tokens=jnp.where(attended, jax.random.randint(keys[1], (M, R, T), 0, V), fill),
        mask=attended.at[0, 0, 1].set(False).at[3, 1, 3].set(False),  # attended, but not the policy's choice
        role=jnp.where(attended, POLICY, 0).astype(jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros((M, R), bool),
        sampling=Sampling(temperature=jnp.linspace(0.7, 1.3, M * R).reshape(M, R)),
    )


def test_an_input_is_needed_if_a_later_token_is_scored():
    exists = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 1]], bool)
    scored = jnp.array([[0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]], bool)
    want = [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]
    assert needed(exists, scored).astype(int).tolist() == want


@pytest.mark.parametrize("shards", [1, 2])
def test_packing_keeps_order_and_comes_back(shards):
    mask = of_rollouts(rollouts())
    assert mask.sum() == 6 + 1 + 3 + 0 + 2 + 2 + 1 + 3  # the last of (3, 1) is not scored, so nobody needs it
    p = packing(mask, Room(tokens=14, shards=shards))
    x = jnp.arange(1, M * R * T + 1).reshape(M, R, T)
    packed = p.pack(x)
    assert packed.shape == (shards, 14)
    if shards == 2:
        assert packed[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 13, 14, 15, 0, 0, 0, 0]
        assert p.unpack(packed).tolist() == jnp.where(mask, x, 0).tolist()
    else:
        assert packed[0].tolist()[:7] == [1, 2, 3, 4, 5, 6, 7]  # 18 tokens, 14 places


def test_the_transposes_are_each_other():
    p = packing(of_rollouts(rollouts()), Room(tokens=20, shards=1))
    x, y = jax.random.normal(jax.random.key(0), (M, R, T, 3)), jax.random.normal(jax.random.key(1), (1, 20, 3))
    pulled = jax.vjp(p.pack, x)[1](y)[0]
    np.testing.assert_allclose((p.pack(x) * y).sum(), (x * pulled).sum(), rtol=1e-5)
    pulled = jax.vjp(p.unpack, y)[1](x)[0]
    np.testing.assert_allclose((p.unpack(y) * x).sum(), (y * pulled).sum(), rtol=1e-5)


def test_the_smallest_room_that_holds_all_is_taken():
    found, index = rooms(rollouts(), 4)
    assert found == (Room(12, 1), Room(24, 1), Room(36, 1), None) and found[index].tokens == 24
    # Ten and eight tokens in the halves.
    found, index = rooms(rollouts(), 6, shards=2)
    assert found[0] == Room(4, 2) and found[index] == Room(12, 2)
    assert rooms(rollouts(), 4, shards=3)[0][0] == Room(12, 1)  # three parts do not divide four contexts
    full = dataclasses.replace(rollouts(), mask=jnp.ones((M, R, T), bool))
    found, index = rooms(full, 4)
    assert found[index] is None


@pytest.mark.parametrize("room, contexts", [(Room(20, 1), 1), (Room(11, 2), 1), (Room(20, 1), 2), (Room(1000, 1), 1)])
def test_packed_scores_and_gradients_are_the_padded_ones(model, params, room, contexts):
    def head(hidden):
        return hidden @ jnp.linspace(-1.0, 1.0, hidden.shape[-1])

    weight = jax.random.normal(jax.random.key(5), (M, R, T))

    def total(params, batch, room):
        found = score(model, params, batch, FIELDS, {"value": head}, room=room)
        every = {"logp": found.logp, "entropy": found.entropy, "value": found.value, **found.extras}
        return sum((weight * x).sum() for x in every.values()), every

    both = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnums=2)
    (_, want), slope = both(params, rollouts(contexts=contexts), None)
    (_, got), packed = both(params, rollouts(contexts=contexts, fill=7), room)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), (got, packed), (want, slope))


def test_chunks_of_logits_go_over_packed_tokens_too(model, params):
    of = functools.partial(score, model, params, rollouts(), FIELDS - {"value"}, room=Room(20, 1))
    whole, cut = of(), of(logits_bytes=4 * V * 6)
    np.testing.assert_allclose(whole.logp, cut.logp, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_packs_is_the_step_that_does_not(tiny, letters, accumulate):
    def one(sizes):
        policy = language_model(tiny, sizes=sizes)
        parts = learner(grpo(group_size=2), policy=policy, task=letters, prompts_per_step=4, accumulate=accumulate)
        return jax.jit(parts.step)(parts.init(jax.random.key(0)))

    (want, before), (got, metrics) = one(1), one(3)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, got.params, want.params)
    close(metrics["grad_norm"], before["grad_norm"])
    close(metrics["loss"], before["loss"])


def test_what_cannot_be_packed_is_refused(model):
    with pytest.raises(ValueError, match="share_prefix=True"):
        language_model(model, sizes=2, share_prefix=False)
    with pytest.raises(ValueError, match=r"Model\.packed"):
        language_model(dataclasses.replace(model, packed=None), sizes=2)
    with pytest.raises(ValueError, match="at least 1"):
        language_model(model, sizes=0)
