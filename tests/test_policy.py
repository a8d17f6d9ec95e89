"""Scores: chunked and whole, masked and poisoned, and what they cost."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.heads import hidden_states
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import EXTRAS, language_model, score
from jaxrl_llm.types import POLICY, Context, Prompts, Rollouts, Sampling

B, G, S, T, V = 2, 2, 4, 5, 11
ALL = frozenset({"logp", "entropy", "value", *EXTRAS})


def model_of(vocab=V, **kw):
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    return transformer(TransformerConfig(vocab_size=vocab, num_key_value_heads=1, head_dim=4, **{**sizes, **kw}))


@functools.cache
def params_of(model):
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


MODEL = model_of()


def rollouts_of(sampling=None, *, contexts=1, length=T, vocab=V):
    keys = jax.random.split(jax.random.key(3), 2)
    context = Context(
        tokens=jax.random.randint(keys[0], (B, S), 0, vocab), mask=jnp.arange(S) < jnp.array([4, 2])[:, None]
    )
    attended = jnp.arange(length) < jnp.array([[length, 1], [3, 0]])[..., None]
    tokens = jax.random.randint(keys[1], (B, G, length), 0, vocab)
    zeros = jnp.zeros(tokens.shape)
    return Rollouts(
        prompts=Prompts(context=context, index=jnp.arange(B), target=()),
        context=jax.tree.map(lambda x: jnp.repeat(x[:, None], contexts, axis=1), context),
        tokens=tokens,
        mask=attended.at[0, 0, 1].set(False),  # attended, but not the policy's choice
        role=jnp.where(attended, POLICY, 0).astype(jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros(tokens.shape[:2], bool),
        sampling=sampling or Sampling(temperature=jnp.array([[1.0, 0.7], [1.3, 1.0]])),
    )


def linear(hidden):
    return hidden @ jnp.linspace(-1.0, 1.0, hidden.shape[-1])


def everything(rollouts, params, **kw):
    scores = score(MODEL, params, rollouts, ALL, {"value": linear}, **kw)
    parts = {"logp": scores.logp, "entropy": scores.entropy, "value": scores.value, **scores.extras}
    return sum(jnp.sum(jnp.sin(x)) for x in parts.values()), parts


def differentiated(rollouts, **kw):
    run = functools.partial(everything, rollouts, **kw)
    return jax.jit(jax.value_and_grad(run, has_aux=True))(params_of(MODEL))


@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 3])
def test_chunks_change_neither_values_nor_gradients(tokens_a_chunk):
    rollouts = rollouts_of()
    whole = differentiated(rollouts)
    chunked = differentiated(rollouts, logits_bytes=4 * B * G * V * tokens_a_chunk)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), chunked, whole)


def test_scores_are_those_of_the_tempered_distribution():
    rollouts = rollouts_of()
    (_, parts), _ = differentiated(rollouts)
    params = params_of(MODEL)
    logits = np.asarray(MODEL.logits(params, jax.jit(functools.partial(hidden_states, MODEL))(params, rollouts)))
    log_p = np.asarray(jax.nn.log_softmax(logits / np.asarray(rollouts.sampling.temperature)[..., None, None]))
    mask = np.asarray(rollouts.mask)
    logp = np.take_along_axis(log_p, np.asarray(rollouts.tokens)[..., None], -1)[..., 0]
    plain = np.asarray(jax.nn.log_softmax(logits))
    expected = {
        "logp": logp,
        "entropy": -(np.exp(log_p) * log_p).sum(-1),
        "mean_logp": plain.mean(-1),
        "top_logp": plain.max(-1),
    }
    for name, x in expected.items():
        np.testing.assert_allclose(parts[name], np.where(mask, x, 0), rtol=1e-5, atol=1e-5)


def test_one_context_for_the_group_or_one_each():
    one, each = (differentiated(rollouts_of(contexts=c)) for c in (1, G))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), each, one)


def test_poison_at_masked_places_changes_no_bit():
    rollouts = rollouts_of()
    dirty = Rollouts(
        **{
            **vars(rollouts),
            "tokens": jnp.where(rollouts.attended, rollouts.tokens, -(2**31)),
            "context": Context(
                tokens=jnp.where(rollouts.context.mask, rollouts.context.tokens, 2**31 - 1), mask=rollouts.context.mask
            ),
        }
    )
    for kw in ({}, {"logits_bytes": 4 * B * G * V}):
        jax.tree.map(np.testing.assert_array_equal, differentiated(dirty, **kw), differentiated(rollouts, **kw))


def test_nan_hidden_states_at_masked_places_do_not_leak():
    rollouts = rollouts_of()
    nowhere = ~rollouts.mask.reshape(B, G, T)[..., None]

    def hidden(*args):
        return jnp.where(nowhere, jnp.nan, MODEL.hidden(*args))

    broken = dataclasses.replace(MODEL, hidden=hidden)

    def run(params):
        scores = score(broken, params, rollouts, ALL, {"value": linear})
        return scores.logp.sum() + scores.entropy.sum() + scores.value.sum() + scores.extras["mean_logp"].sum()

    value, gradient = jax.jit(jax.value_and_grad(run))(params_of(MODEL))
    assert bool(jnp.isfinite(value)) and all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    for x in jax.tree.leaves(jax.jit(everything)(rollouts, params_of(MODEL))[1]):
        np.testing.assert_array_equal(jnp.where(rollouts.mask, 0, x), 0)


def flops(fields, heads=None):
    run = jax.jit(lambda p, r: score(MODEL_WIDE, p, r, frozenset(fields), heads))
    shapes = jax.eval_shape(MODEL_WIDE.init, jax.random.key(0))
    return run.lower(shapes, rollouts_of(vocab=4096)).compile().cost_analysis()["flops"]


MODEL_WIDE = model_of(4096)


def test_a_value_alone_computes_no_logits():
    alone = flops({"value"}, {"value": linear})
    assert flops({"logp"}) - alone > 2 * B * G * T * 8 * 4096 * 0.9
    assert alone < 2 * B * G * T * 8 * 4096 / 4


def test_unknown_fields_are_refused():
    with pytest.raises(ValueError, match=r"no score named 'value'; this policy has logp, entropy, mean_logp"):
        score(MODEL, {}, rollouts_of(), frozenset({"value"}))
    assert score(MODEL, {}, rollouts_of(), frozenset()).logp is None


def test_logits_never_exist_at_once():
    vocab, budget, length = 151_936, 16 * 2**20, 256
    model = model_of(vocab)
    rollouts = jax.eval_shape(lambda: rollouts_of(length=length, vocab=vocab))
    shapes = jax.eval_shape(model.init, jax.random.key(0))

    def temporary(logits_bytes):
        def run(params, rollouts):
            return score(model, params, rollouts, frozenset({"logp"}), logits_bytes=logits_bytes).logp.sum()

        compiled = jax.jit(jax.value_and_grad(run)).lower(shapes, rollouts).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    everything = 4 * B * G * length * vocab
    assert temporary(10 * everything) > everything, "the measure sees logits where there are some"
    used = temporary(budget)
    assert used < everything / 6, f"{used / 2**20:.0f} MiB"
    assert used < 6 * budget, f"{used / 2**20:.0f} MiB"


def test_a_policy_is_sampled_and_scored_alike():
    policy = language_model(MODEL)
    rollouts = rollouts_of()
    params = params_of(MODEL)
    keys = jax.random.split(jax.random.key(5), (B, G))
    samples = jax.jit(functools.partial(policy.sample, length=T, eos=(1,), stop=()))(
        params, keys, rollouts.context, rollouts.sampling
    )
    drawn = Rollouts(
        **{
            **vars(rollouts),
            "tokens": samples.tokens,
            "mask": samples.mask,
            "role": jnp.where(samples.mask, POLICY, 0).astype(jnp.int8),
        }
    )
    scores = jax.jit(lambda p, r: policy.score(p, r, frozenset({"logp", "entropy"})))(params, drawn)
    assert bool(samples.mask.any())
    np.testing.assert_allclose(scores.logp, samples.logp, atol=1e-5)
    np.testing.assert_allclose(scores.entropy, samples.entropy, atol=1e-5)
