"""Decoding by a scan over layers against layers written out: the same samples."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

CONFIG = TransformerConfig(
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    qkv_bias=True,
)
B, G, S, T = 2, 3, 5, 6


def both(heads=2):
    """Written out and scanned, and parameters for either."""
    config = dataclasses.replace(CONFIG, num_key_value_heads=heads)
    models = [transformer(dataclasses.replace(config, scan_decode=scan)) for scan in (False, True)]
    leaves, tree = jax.tree.flatten(jax.eval_shape(models[0].init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return models, tree.unflatten([0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.mark.parametrize("slots", [None, 2])
@pytest.mark.parametrize("heads", [1, 2])
def test_samples_are_the_same(slots, heads):
    models, params = both(heads)
    context = Context(
        tokens=jax.random.randint(jax.random.key(2), (B, 1, S), 0, 23),
        mask=jnp.arange(S) < jnp.array([5, 3])[:, None, None],
    )
    keys = jax.random.split(jax.random.key(3), (B, G))

    def draw(model):
        def of(params):
            return sample(model, params, keys, context, Sampling(temperature=1.0), length=T, eos=(0,), slots=slots)

        return jax.jit(of)(params)

    plain, scan = map(draw, models)
    np.testing.assert_array_equal(scan.tokens, plain.tokens)
    np.testing.assert_array_equal(scan.mask, plain.mask)
    np.testing.assert_allclose(scan.logp, plain.logp, atol=1e-5)
    assert len(np.unique(plain.tokens)) > 5  # not all alike


def test_rows_may_stand_at_different_tokens():
    models, params = both()
    prefix = Context(tokens=jnp.array([[3, 4]]), mask=jnp.ones((1, 2), bool))
    steps = [(jnp.array([[0, 0]]), None), (jnp.array([[1, 0]]), None), (jnp.array([[2, 1]]), jnp.int32(2))]

    def last(model):
        cache, decoder, seen = model.empty(1, 2, 4), model.decoder(params), model.prefill(params, prefix)
        for t, column in steps:
            inputs = jnp.array([[5, 6]])
            hidden, cache = model.decode(decoder, seen, prefix.mask, cache, jnp.array([2]), inputs, t, column)
        return hidden

    plain, scan = map(last, models)
    np.testing.assert_allclose(scan, plain, atol=1e-5)


def test_the_program_does_not_grow_with_the_layers():
    def size(layers, scan):
        model = transformer(dataclasses.replace(CONFIG, num_hidden_layers=layers, scan_decode=scan))
        params = jax.eval_shape(model.init, jax.random.key(0))
        context = Context(tokens=jnp.ones((B, 1, S), jnp.int32), mask=jnp.ones((B, 1, S), bool))

        def of(params, keys):
            return sample(model, params, keys, context, Sampling(), length=T)

        return len(jax.jit(of).lower(params, jax.random.split(jax.random.key(0), (B, G))).as_text())

    assert size(8, True) < 1.02 * size(2, True)
    assert size(8, False) > 1.5 * size(2, False)
