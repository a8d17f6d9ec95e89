"""The TPU's kernel, interpreted, against the attention the library computes everywhere else."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import hlo, sharding
from jaxrl_llm.models import attention, splash
from jaxrl_llm.models.config import TransformerConfig

M, R, S, T, H, K, D = 2, 2, 5, 9, 4, 2, 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def compare(plain, kernel, inputs, where):
    """Values where somebody reads them, and gradients of a function of those."""

    def scalar(function):
        return lambda *x: (jnp.where(where[..., None, None], jnp.sin(function(*x)), 0.0)).sum()

    @jax.jit
    def both(*x):
        argnums = tuple(range(len(x)))
        return [(f(*x), jax.grad(scalar(f), argnums)(*x)) for f in (plain, kernel)]

    (a, slopes), (b, others) = both(*inputs)
    np.testing.assert_allclose(np.where(where[..., None, None], a - b, 0), 0, atol=2e-5)
    for x, y in zip(slopes, others, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-5)
        assert np.abs(x).max() > 0.1


def test_rows_that_attend_to_themselves():
    mask = jnp.arange(S) < jnp.array([5, 3])[:, None]
    inputs = normal(0, M, S, H, D), normal(1, M, S, K, D), normal(2, M, S, K, D)
    compare(
        lambda q, k, v: attention.causal(q, k, v, mask),
        lambda q, k, v: splash.causal(q, k, v, mask, interpret=True),
        inputs,
        mask,
    )


@pytest.mark.slow
def test_responses_that_share_a_prefix():
    pmask = jnp.arange(S) < jnp.array([5, 2])[:, None]
    exists = jnp.arange(T) < jnp.array([[9, 4], [6, 9]])[..., None]
    seen = jnp.tril(jnp.ones((T, T), bool)) & exists[:, :, None]
    inputs = (
        *(normal(3, M, R, T, H, D), normal(4, M, S, K, D), normal(5, M, S, K, D)),
        *(normal(6, M, R, T, K, D), normal(7, M, R, T, K, D)),
    )
    compare(
        lambda q, pk, pv, ok, ov: attention.shared_prefix(q, (pk, pv, pmask), (ok, ov, seen)),
        lambda q, pk, pv, ok, ov: splash.shared_prefix(q, (pk, pv, pmask), (ok, ov, exists), interpret=True),
        inputs,
        exists,
    )


def test_what_the_kernel_does_not_compute_is_refused():
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, head_dim=4)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(ValueError, match="sliding windows"):
        TransformerConfig(**sizes, **heads, attention="splash", sliding_window=4)
    with pytest.raises(ValueError, match="soft caps"):
        TransformerConfig(**sizes, **heads, attention="splash", attn_logit_softcapping=50.0)
    with pytest.raises(ValueError, match="'flash'"):
        TransformerConfig(**sizes, **heads, attention="flash")


def test_without_a_tpu_the_switch_changes_nothing():
    mask = jnp.arange(S) < jnp.array([5, 3])[:, None]
    inputs = normal(0, M, S, H, D), normal(1, M, S, K, D), normal(2, M, S, K, D), mask
    plain = attention.causal(*inputs)
    other = jax.jit(lambda *x: attention.causal(*x, attention.Rule(splash=True)))(*inputs)
    np.testing.assert_allclose(other, plain, atol=1e-6)


def test_every_device_attends_to_the_rows_and_heads_it_has():
    mask = jnp.arange(S) < jnp.array([5, 3, 1, 4])[:, None]
    inputs = normal(0, 4, S, H, D), normal(1, 4, S, K, D), normal(2, 4, S, K, D), mask
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    of = sharding.on_mesh(mesh, functools.partial(splash.causal, interpret=True))
    program = jax.jit(of).lower(*sharding.place(mesh, inputs)).compile()
    found = program(*sharding.place(mesh, inputs))
    seen = mask[..., None, None]
    np.testing.assert_allclose(np.where(seen, found - attention.causal(*inputs), 0), 0, atol=2e-5)
    assert found.sharding.spec[0] == ("data", "fsdp")
    assert "all-gather" not in {one.kind for one in hlo.each_collective(program.as_text()) if one.bytes > 64}
