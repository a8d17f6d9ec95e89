"""Windows, caps, scaled positions and experts together: scored, decoded, refilled, cut to fewer layers."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.attention import rotary
from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.model import inputs_of, prefix_of, separate_prefixes
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.models.weights import stored
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

M, S, R, T, V = 3, 7, 2, 9, 13
LENGTHS = np.array([7, 4, 1])
SIZES = dict(
    vocab_size=V, hidden_size=8, intermediate_size=12, num_attention_heads=4, num_key_value_heads=2, head_dim=4
)
# No published model has all of this at once.
EVERYTHING = TransformerConfig(
    **SIZES,
    num_hidden_layers=3,
    qk_norm=True,
    rope_theta=500.0,
    rope_scaling=RopeScaling(rope_type="llama3", factor=4.0, original_max_position_embeddings=16),
    rope_local_base_freq=10.0,
    sliding_window=4,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    hidden_act="gelu_pytorch_tanh",
    query_pre_attn_scalar=7.0,
    attn_logit_softcapping=3.0,
    final_logit_softcapping=6.0,
    unit_offset_norm=True,
    sandwich_norms=True,
    scale_embeddings=True,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=5,
)


def params_of(config, seed=0):
    rng, params = np.random.default_rng(seed), {}
    for parameter in stored(config):
        node, (*parents, leaf) = params, parameter.path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = jnp.asarray(0.5 * rng.normal(size=parameter.whole), jnp.float32)
    return params


def context():
    tokens = jax.random.randint(jax.random.key(1), (M, S), 0, V // 2)
    return Context(tokens=tokens, mask=jnp.arange(S) < LENGTHS[:, None])


def logits_of(model, params, context, tokens):
    prefix, offset, last = prefix_of(context)
    attended = jnp.ones(tokens.shape, bool)
    return model.logits(params, model.hidden(params, prefix, offset, inputs_of(last, tokens, attended), attended))


def test_what_is_sampled_is_what_is_scored_with_and_without_refill():
    model, params = transformer(EVERYTHING), params_of(EVERYTHING)
    keys = jax.random.split(jax.random.key(2), (M, R))
    each = jax.tree.map(lambda x: x[:, None], context())

    def draw(slots):
        run = functools.partial(sample, model, length=T, eos=(0,), slots=slots)
        return jax.jit(run)(params, keys, each, Sampling(temperature=1.0))

    whole, refilled = draw(None), draw(2)
    np.testing.assert_array_equal(refilled.tokens, whole.tokens)
    np.testing.assert_allclose(refilled.logp, whole.logp, atol=1e-4)
    assert int(whole.mask.sum(-1).min()) < T, "no row made room for another"
    logits = jax.jit(functools.partial(logits_of, model))(params, context(), whole.tokens)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), whole.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(jnp.where(whole.mask, logp, 0), whole.logp, atol=1e-4)


def test_a_shared_prefix_equals_a_prefix_each():
    model, params = transformer(EVERYTHING), params_of(EVERYTHING)
    tokens = jax.random.randint(jax.random.key(3), (M, R, T), 0, V)

    @jax.jit
    def run(params):
        return [logits_of(m, params, context(), tokens) for m in (model, separate_prefixes(model))]

    shared, separate = run(params)
    np.testing.assert_allclose(shared, separate, atol=2e-5)


def test_experts_computed_densely_and_raggedly_are_the_same():
    tokens = jax.random.randint(jax.random.key(3), (M, R, 4), 0, V)
    config, params = dataclasses.replace(EVERYTHING, num_hidden_layers=1, layer_types=()), params_of(EVERYTHING)
    params["layers"] = jax.tree.map(lambda x: x[:1], params["layers"])

    def run(params, how):
        model = transformer(dataclasses.replace(config, experts_implementation=how))
        logits = logits_of(model, params, context(), tokens)
        return jnp.sum(jnp.sin(logits)), logits

    both = [jax.jit(jax.grad(functools.partial(run, how=h), has_aux=True))(params) for h in ("dense", "ragged")]
    assert float(jnp.abs(both[0][0]["layers"]["router"]["kernel"]).max()) > 1e-3
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_inner_layers_are_those_of_a_shallower_model():
    model, params, ctx = transformer(EVERYTHING), params_of(EVERYTHING), context()
    prefix, offset, last = prefix_of(ctx)
    tokens = jax.random.randint(jax.random.key(3), (M, R, T), 0, V)
    attended = jnp.ones(tokens.shape, bool)
    inputs = inputs_of(last, tokens, attended)
    shallow = EVERYTHING.first_layers(2)
    assert shallow.layer_types == EVERYTHING.layer_types[:2]
    assert EVERYTHING.first_layers(1).layer_types == (), "one layer is like itself"
    few = {**params, "layers": jax.tree.map(lambda x: x[:2], params["layers"])}

    @jax.jit
    def run(params, few):
        rest = prefix, offset, inputs, attended
        return model.inner(params, *rest, layer=1), transformer(shallow).inner(few, *rest, layer=1)

    np.testing.assert_array_equal(*run(params, few))


def test_a_window_ends_where_it_says():
    """One layer that sees four tokens: what stands four before a token changes no bit of it, what stands three does."""
    config = TransformerConfig(**SIZES, num_hidden_layers=1, sliding_window=4)
    model, params = transformer(config), params_of(config)
    tokens = jax.random.randint(jax.random.key(3), (M, R, T), 1, V)
    run = jax.jit(functools.partial(logits_of, model))
    before = run(params, context(), tokens)

    def changed(length, at):
        """Which outputs of a row change with its `at`-th token, counted from the context's first."""
        row, ctx = int(np.flatnonzero(length == LENGTHS)[0]), context()
        if at < length:
            ctx = dataclasses.replace(ctx, tokens=ctx.tokens.at[row, at].set(V - 1 - ctx.tokens[row, at]))
            after = run(params, ctx, tokens)
        else:
            after = run(params, ctx, tokens.at[row, 0, at - length].set(0))
        return np.flatnonzero(np.abs(after - before)[row, 0].max(-1)) + length - 1

    # Position p predicts token p + 1.
    for length, at in ((7, 0), (7, 3), (7, 5), (4, 0), (4, 2), (4, 5), (1, 0), (1, 4)):
        seen = np.arange(at, at + 4)
        np.testing.assert_array_equal(changed(length, at), seen[(seen >= length - 1) & (seen < length - 1 + T)])


def test_frequencies_of_scaled_positions():
    """Turns within 64 tokens: 64 / 2π for the first pair, 0.064 / 2π for the last; between them a mixture."""
    one = jnp.ones(1, jnp.int32)
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)

    def angles(scaling):
        cos, sin = rotary(one, 8, 10_000.0, scaling)
        return jnp.arctan2(sin, cos)[0]

    plain, slow = angles(None), angles(scaling)
    turns = 64 * 0.1 / (2 * np.pi)  # of the second pair: 1.0186, a little above low_freq_factor
    share = (turns - 1) / 3
    expected = [1.0, 0.1 * (share + (1 - share) / 8), 0.01 / 8, 0.001 / 8]
    np.testing.assert_allclose(slow, expected, rtol=1e-5)
    np.testing.assert_allclose(angles(RopeScaling(rope_type="linear", factor=4.0)), plain / 4, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; supported are silu, gelu_pytorch_tanh"),
        ({"layer_types": ("full_attention",)}, "layer_types names 1 layers of 3"),
        ({"layer_types": ("full_attention", "linear", "full_attention")}, "layer_types has 'linear'"),
        ({"sliding_window": None}, "sliding layers need a sliding_window"),
        ({"sliding_window": 0}, "sliding layers need a sliding_window"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be positive"),
        ({"num_experts_per_tok": 4}, r"num_experts_per_tok \(4\) must be between 1 and num_experts \(3\)"),
        ({"moe_intermediate_size": 0}, "experts need a moe_intermediate_size"),
        ({"experts_implementation": "fast"}, "experts_implementation must be 'dense' or 'ragged'"),
    ],
)
def test_switches_that_do_not_fit(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(EVERYTHING, **change)


@pytest.mark.parametrize(
    ("kw", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "rope_type is 'yarn'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor of rope scaling must be at least 1"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "must be below high_freq_factor"),
    ],
)
def test_scalings_that_do_not_fit(kw, words):
    with pytest.raises(ValueError, match=words):
        RopeScaling(**kw)
