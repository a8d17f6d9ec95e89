"""The grouped forward pass against a plain causal one, row by row."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.types import Context

M, S, R, T, V = 3, 6, 2, 4, 19
LENGTHS = np.array([6, 3, 1])
VARIANTS = {
    "tied": {},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": False},
    "qwen3": {"qk_norm": True, "head_dim": 6},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1, "rope_theta": 50.0},
}


def config_of(**kw):
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
    return TransformerConfig(**{**sizes, "num_key_value_heads": 2, "head_dim": 4, **kw})


@functools.cache
def model_of(**kw):
    model = transformer(config_of(**kw))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    # Larger than a fresh model's, and no unit norms or zero biases that would hide a missing one.
    return model, tree.unflatten([0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def data():
    keys = jax.random.split(jax.random.key(1), 2)
    tokens = jax.random.randint(keys[0], (M, S), 0, V)
    responses = jax.random.randint(keys[1], (M, R, T), 0, V)
    attended = jnp.arange(T) < jnp.array([[4, 2], [1, 4], [3, 0]])[..., None]
    return Context(tokens=tokens, mask=jnp.arange(S) < LENGTHS[:, None]), responses, attended


def grouped(model, params, context, tokens, attended):
    prefix, offset, last = prefix_of(context)
    hidden = model.hidden(params, prefix, offset, inputs_of(last, tokens, attended), attended)
    return model.logits(params, hidden)


def rms(x, scale, eps=1e-6):
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def turned(x, theta):
    """Rotary embedding as complex multiplication: independent of the library's."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[0])[:, None, None] * theta ** (-jnp.arange(half) / half)
    z = (x[..., :half] + 1j * x[..., half:]) * jnp.exp(1j * angle)
    return jnp.concatenate([z.real, z.imag], -1)


def plain(config, params, tokens):
    """One row of real tokens, `[L] -> [L V]`, written without any of the library's code."""
    c = config
    x = params["embed"][tokens]
    causal = jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
    for i in range(c.num_hidden_layers):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        h = rms(x, p["input_norm"]["scale"])
        q, k, v = (h @ p[n]["kernel"] + p[n].get("bias", 0.0) for n in ("q_proj", "k_proj", "v_proj"))
        q, k, v = (y.reshape(len(tokens), -1, c.head_dim) for y in (q, k, v))
        if c.qk_norm:
            q, k = rms(q, p["q_norm"]["scale"]), rms(k, p["k_norm"]["scale"])
        q, k = turned(q, c.rope_theta), turned(k, c.rope_theta)
        k, v = (jnp.repeat(y, c.num_attention_heads // c.num_key_value_heads, axis=1) for y in (k, v))
        score = jnp.where(causal, jnp.einsum("thd,uhd->htu", q, k) / c.head_dim**0.5, -jnp.inf)
        out = jnp.einsum("htu,uhd->thd", jax.nn.softmax(score, -1), v)
        x = x + out.reshape(len(tokens), -1) @ p["o_proj"]["kernel"]
        h = rms(x, p["mlp_norm"]["scale"])
        x = x + (jax.nn.silu(h @ p["gate_proj"]["kernel"]) * (h @ p["up_proj"]["kernel"])) @ p["down_proj"]["kernel"]
    x = rms(x, params["norm"]["scale"])
    return x @ (params["embed"].T if c.tie_word_embeddings else params["lm_head"])


def row_by_row(config, params, context, tokens, attended):
    """Each response behind its own copy of its context; what is padding comes last, where causality hides it."""
    column = jnp.arange(S + T)
    start = LENGTHS[:, None, None]
    text = jnp.concatenate([jnp.repeat(context.tokens[:, None], R, axis=1), tokens], axis=-1)
    rows = jnp.take_along_axis(text, jnp.where(column < start, column, (column - start + S) % (S + T)), axis=-1)
    logits = jax.vmap(functools.partial(plain, config, params))(rows.reshape(M * R, S + T)).reshape(M, R, S + T, V)
    return jnp.take_along_axis(logits, (start - 1 + jnp.arange(T))[..., None], axis=2)


def objective(logits, tokens, attended):
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(attended, logp * jnp.arange(1.0, T + 1), 0.0))


def evaluated(forward, params, context, tokens, attended):
    def run(params):
        logits = forward(params, context, tokens, attended)
        return objective(logits, tokens, attended), logits

    (_, logits), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    return jnp.where(attended[..., None], logits, 0), gradient


def assert_near(x, y, tolerance=2e-5):
    """Equal up to a fraction of the largest entry."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max())), x, y)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_group_equals_its_rows_one_by_one(name):
    config, (model, params) = config_of(**VARIANTS[name]), model_of(**VARIANTS[name])
    mine = evaluated(functools.partial(grouped, model), params, *data())
    assert_near(mine, evaluated(functools.partial(row_by_row, config), params, *data()))


def test_contexts_of_their_own_equal_shared_ones():
    model, params = model_of()
    context, tokens, attended = data()
    shared = evaluated(functools.partial(grouped, model), params, context, tokens, attended)
    each = jax.tree.map(lambda x: jnp.repeat(x, R, axis=0), context)
    alone = [x.reshape(M * R, 1, T) for x in (tokens, attended)]
    logits, gradient = evaluated(functools.partial(grouped, model), params, each, *alone)
    assert_near((logits.reshape(shared[0].shape), gradient), shared)


@pytest.mark.parametrize("remat", ["full", "dots_with_no_batch_dims_saveable"])
def test_remat_changes_nothing(remat):
    model, params = model_of(remat=None)
    again, _ = model_of(remat=remat)
    assert_near(*(evaluated(functools.partial(grouped, m), params, *data()) for m in (again, model)), tolerance=1e-6)


def test_bfloat16_is_near_and_keeps_float32_gradients():
    model, params = model_of()
    half, _ = model_of(dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: 0.3 * x, params)
    logits, gradient = evaluated(functools.partial(grouped, half), params, *data())
    wanted, _ = evaluated(functools.partial(grouped, model), params, *data())
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))
    assert_near(logits, wanted, tolerance=0.05)
    assert float(jnp.abs(logits - wanted).max()) > 0, "bfloat16 was not used"


def test_tokens_at_masked_places_change_no_bit():
    model, params = model_of()
    context, tokens, attended = data()
    poisoned = Context(tokens=jnp.where(context.mask, context.tokens, 2**31 - 1), mask=context.mask)
    run = functools.partial(evaluated, functools.partial(grouped, model), params)
    clean = jax.tree.map(np.asarray, run(context, jnp.where(attended, tokens, 0), attended))
    dirty = jax.tree.map(np.asarray, run(poisoned, jnp.where(attended, tokens, -7), attended))
    jax.tree.map(np.testing.assert_array_equal, dirty[1], clean[1])
    np.testing.assert_array_equal(dirty[0], clean[0])


def test_a_context_of_one_column():
    model, params = model_of()
    context, tokens, attended = data()
    short = jax.tree.map(lambda x: x[2:, :1], context)
    wide = jax.tree.map(lambda x: x[2:], context)
    both = (grouped(model, params, c, tokens[2:], attended[2:]) for c in (short, wide))
    one, other = (jnp.where(attended[2:, ..., None], x, 0) for x in both)
    assert_near(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads .4. must be a multiple of num_key_value_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"remat": "everything"}, "remat must be None, 'full' or a name"),
    ],
)
def test_sizes_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        config_of(**change)
