"""Slot refill gives the responses of the plain mode, in order, in fewer steps."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

VOCAB = 24
MODEL = transformer(
    TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
)


@pytest.fixture(scope="module")
def params():
    weights = MODEL.init(jax.random.key(0))
    return {**weights, "lm_head": weights["lm_head"] * 10}


@functools.cache
def program(**options: Any):
    return jax.jit(functools.partial(sample, MODEL, **options))


def problem(b, g, c, s=6):
    lengths = jax.random.randint(jax.random.key(1), (b, c), 1, s + 1)
    context = Context(
        tokens=jax.random.randint(jax.random.key(2), (b, c, s), 0, VOCAB), mask=jnp.arange(s) < lengths[..., None]
    )
    return jax.random.split(jax.random.key(3), (b, g)), context


@pytest.mark.parametrize("c, slots", [(1, 1), (1, 5), (4, 6), (1, 12)])
def test_refill_equals_sampling_all_at_once(params, c, slots):
    keys, context = problem(3, 4, c)
    sampling = Sampling(temperature=jnp.linspace(0.6, 1.4, 12).reshape(3, 4), top_p=jnp.array(0.95))
    settings = {"length": 14, "eos": (1, 2), "stop": ((3, 20), (9,), (4, 5, 6))}
    plain = program(**settings)(params, keys, context, sampling)
    refilled = program(**settings, slots=slots)(params, keys, context, sampling)
    lengths = np.asarray(plain.mask.sum(-1)).ravel()
    assert plain.truncated.any() and len(set(lengths.tolist())) > 3
    for field in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(refilled, field), getattr(plain, field), err_msg=field)
    np.testing.assert_allclose(refilled.logp, plain.logp, atol=1e-5)
    np.testing.assert_allclose(refilled.entropy, plain.entropy, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 4, 5])
def test_no_slot_waits_while_rows_are_pending(params, slots):
    count: list[int] = []

    def decode(*args, **options):
        jax.debug.callback(lambda: count.append(1))
        return MODEL.decode(*args, **options)

    keys, context = problem(3, 6, 1)
    samples = sample(
        dataclasses.replace(MODEL, decode=decode),
        params,
        keys,
        context,
        Sampling(),
        length=20,
        eos=(1, 2, 3),
        slots=slots,
    )
    jax.effects_barrier()
    free_at = np.zeros(slots, int)
    for length in np.asarray(samples.mask.sum(-1)).ravel():
        free_at[free_at.argmin()] += length
    assert len(count) == free_at.max()


def test_rows_that_never_end_take_their_whole_length(params):
    keys, context = problem(3, 3, 1)
    plain = sample(MODEL, params, keys, context, Sampling(), length=7)
    refilled = sample(MODEL, params, keys, context, Sampling(), length=7, slots=2)
    assert refilled.truncated.all() and refilled.mask.all()
    np.testing.assert_array_equal(refilled.tokens, plain.tokens)


@pytest.mark.parametrize("slots", [None, 4])
def test_a_step_copies_no_cache(params, slots):
    """The only copies of a cache's shape in the compiled program are the zeros the loop starts with."""
    keys, context = problem(3, 3, 1)
    draw = program(length=7, slots=slots)
    text = draw.lower(params, keys, context, Sampling(temperature=jnp.array(1.0))).compile().as_text()
    rows, layers, dim = slots or 9, 2, 8
    assert f"f32[{rows},{dim},7]" in text
    for shape in (f"f32[{rows},{dim},7]", f"f32[{rows},7,{dim}]"):
        assert sum(" copy(" in line for line in text.splitlines() if f"= {shape}" in line) <= layers
