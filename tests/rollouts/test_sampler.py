"""The sampler: what it draws, when it ends, and that training recomputes what it reports."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts import sampler
from jaxrl_llm.rollouts.distribution import log_prob
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

VOCAB, EOS = 40, (1, 2, 3)
CONFIG = TransformerConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=False,
)
MODEL = transformer(CONFIG)


@pytest.fixture(scope="module")
def params():
    weights = MODEL.init(jax.random.key(0))
    return {**weights, "lm_head": weights["lm_head"] * 10}  # a distribution that is not flat


def contexts(b, c, s, seed=1):
    """Ragged contexts; the first row has one token, so that its prefix is empty."""
    lengths = jax.random.randint(jax.random.key(seed), (b, c), 1, s + 1).at[0, 0].set(1)
    mask = jnp.arange(s) < lengths[..., None]
    tokens = jax.random.randint(jax.random.key(seed + 1), (b, c, s), 0, VOCAB)
    return Context(tokens=jnp.where(mask, tokens, 0), mask=mask)


def rescored(params, context, samples, sampling):
    b, g, t = samples.tokens.shape
    c = context.tokens.shape[1]
    flat = jax.tree.map(lambda x: x.reshape(b * c, -1), context)
    tokens, mask = (x.reshape(b * c, g // c, t) for x in (samples.tokens, samples.mask))
    prefix, offset, last = prefix_of(flat)
    hidden = MODEL.hidden(params, prefix, offset, inputs_of(last, tokens, mask), mask)
    logits = MODEL.logits(params, hidden).reshape(b, g, t, VOCAB)
    each = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, g))[..., None], sampling)
    return logits, *log_prob(logits, samples.tokens, each)


@functools.cache
def program(length: int, **options: Any):
    return jax.jit(functools.partial(sample, MODEL, length=length, **options))


def run(params, *, b=3, g=4, seed=2, temperature=1.0, top_k=0, length=12, context=None, **options):
    keys = jax.random.split(jax.random.key(seed), (b, g))
    context = contexts(b, 1, 6) if context is None else context
    sampling = Sampling(temperature=jnp.array(temperature), top_k=jnp.array(top_k))
    return context, program(length, **options)(params, keys, context, sampling)


NAMES = ("temperature", "top_k", "top_p", "min_p")
VALUES = list(itertools.product([0.7, 1.0, 1.3], [0, 5], [1.0, 0.8], [0.0, 0.1]))


@pytest.mark.parametrize("c, filters", [(1, True), (4, True), (1, False)])
def test_rescored_log_prob_and_entropy_equal_the_sampled_ones(params, c, filters):
    """In ragged contexts; one program holds the filters, their values (also those that switch them off) are arrays."""

    traced = []

    @jax.jit
    def both(sampling):
        traced.append(1)
        keys = jax.random.split(jax.random.key(2), (3, 4))
        context = contexts(3, c, 6)
        samples = sample(MODEL, params, keys, context, sampling, length=8, eos=EOS)
        return samples, *rescored(params, context, samples, sampling)[1:]

    for value in VALUES if filters else [(0.7,), (1.0,), (1.3,)]:
        samples, logp, entropy = both(Sampling(**dict(zip(NAMES, map(jnp.array, value), strict=False))))
        mask = np.asarray(samples.mask)
        assert 20 < mask.sum() < mask.size
        np.testing.assert_allclose(np.where(mask, logp, 0), samples.logp, atol=1e-5, err_msg=str(value))
        np.testing.assert_allclose(np.where(mask, entropy, 0), samples.entropy, atol=1e-5, err_msg=str(value))
    assert len(traced) == 1


def test_rows_of_a_group_share_no_noise_and_keys_decide_the_text(params):
    same = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], (3, *x.shape[1:])), contexts(3, 1, 6))
    _, samples = run(params, context=same)
    rows = {tuple(row) for row in np.asarray(samples.tokens).reshape(12, 12).tolist()}
    assert len(rows) == 12
    keys = jnp.broadcast_to(jax.random.key(5), (3, 4))
    repeated = program(12)(params, keys, same, Sampling(temperature=jnp.array(1.0), top_k=jnp.array(0)))
    assert len({tuple(row) for row in np.asarray(repeated.tokens).reshape(12, 12).tolist()}) == 1


@pytest.mark.parametrize("options", [{}, {"slots": 2}])
def test_same_key_same_text_in_another_batch(params, options):
    context = contexts(4, 1, 6)
    keys = jax.random.split(jax.random.key(3), (4, 3))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    draw = program(8, eos=EOS, **options)
    whole = draw(params, keys, context, sampling)
    # Another order, another number of prompts and rows, wider padding, a context of each row's own.
    chosen, rows = jnp.array([3, 0]), jnp.array([2, 1])
    part = jax.tree.map(lambda x: jnp.pad(x[chosen], [(0, 0), (0, 0), (0, 3)]), context)
    part = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 2, 9)), part)
    other = draw(params, keys[chosen][:, rows], part, sampling)
    for field in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(other, field), getattr(whole, field)[chosen][:, rows])
    np.testing.assert_allclose(other.logp, whole.logp[chosen][:, rows], atol=1e-5)


def test_greedy_is_the_argmax_of_a_full_forward(params):
    sampling = Sampling(temperature=jnp.array(0.0), top_k=jnp.array(-1))
    context, samples = run(params, temperature=0.0, top_k=-1)
    logits, logp, _ = rescored(params, context, samples, sampling)
    np.testing.assert_array_equal(samples.tokens, jnp.argmax(logits, -1))
    np.testing.assert_allclose(samples.logp, jax.nn.log_softmax(logits).max(-1), atol=1e-5)
    np.testing.assert_allclose(samples.logp, logp, atol=1e-5)


def test_top_k_below_one_is_off(params):
    off = [run(params, top_k=k)[1].tokens for k in (-1, 0, VOCAB)]
    np.testing.assert_array_equal(off[0], off[1])
    np.testing.assert_array_equal(off[0], off[2])
    assert len(set(np.asarray(off[0]).ravel().tolist())) > 10


def test_eos_is_a_sampled_token_and_nothing_follows_it(params):
    _, free = run(params)
    _, ended = run(params, eos=EOS)
    tokens, mask = np.asarray(ended.tokens), np.asarray(ended.mask)
    assert ended.truncated.any() and not ended.truncated.all()
    for i, j in np.ndindex(3, 4):
        n = mask[i, j].sum()
        assert mask[i, j, :n].all()
        np.testing.assert_array_equal(tokens[i, j, :n], free.tokens[i, j, :n])
        assert not np.isin(tokens[i, j, : n - 1], EOS).any()
        assert np.isin(tokens[i, j, n - 1], EOS) != ended.truncated[i, j]
        assert n == 12 or not ended.truncated[i, j]
        assert ended.logp[i, j, n - 1] < 0
    for x in (ended.tokens, ended.logp, ended.entropy):
        assert (np.asarray(x)[~mask] == 0).all()


def test_a_row_that_ends_with_its_last_token_is_not_truncated(params):
    _, free = run(params)
    last = np.asarray(free.tokens[..., -1])
    i, j = next(at for at in np.ndindex(3, 4) if last[at] not in np.asarray(free.tokens)[at][:-1])
    _, samples = run(params, eos=(int(last[i, j]),))
    assert samples.mask[i, j].all() and not samples.truncated[i, j]


def test_token_zero_is_a_token(params):
    """The padding id may be chosen: it counts, and it can end a response."""
    _, samples = run(params)
    assert (samples.tokens == 0).any() and samples.mask.all() and samples.truncated.all()
    assert (samples.logp < 0).all()
    _, ended = run(params, eos=(0,))
    np.testing.assert_array_equal(
        ended.mask.sum(-1), np.where((samples.tokens == 0).any(-1), jnp.argmax(samples.tokens == 0, -1) + 1, 12)
    )


def test_stop_sequences_end_a_row_and_stay_in_it(params):
    _, free = run(params)
    first, second = (tuple(np.asarray(free.tokens[i, j, a:b]).tolist()) for i, j, a, b in ((0, 1, 3, 5), (2, 3, 0, 3)))
    _, samples = run(params, stop=(first, second, (VOCAB + 7,)))
    for i, j in np.ndindex(3, 4):
        row = np.asarray(free.tokens[i, j]).tolist()
        ends = [n for n in range(1, 13) if tuple(row[:n][-2:]) == first or tuple(row[:n][-3:]) == second]
        n = min(ends, default=12)
        assert samples.mask[i, j].sum() == n
        assert bool(samples.truncated[i, j]) == (not ends)
        np.testing.assert_array_equal(samples.tokens[i, j, :n], row[:n])
    assert samples.mask[0, 1].sum() <= 5 and samples.mask[2, 3].sum() == 3
    # A sequence is matched within the response only.
    single = Context(tokens=jnp.full((1, 1, 1), first[0]), mask=jnp.ones((1, 1, 1), bool))
    _, samples = run(params, b=1, g=4, context=single, length=1, stop=((first[0], int(free.tokens[0, 0, 0])),))
    assert samples.truncated.all()


def counting(count):
    """The model, and a host counter of its decoding steps."""

    def decode(*args, **options):
        jax.debug.callback(lambda: count.append(1))
        return MODEL.decode(*args, **options)

    return dataclasses.replace(MODEL, decode=decode)


def test_the_loop_ends_with_the_last_row(params):
    for eos in ((), tuple(range(VOCAB)), tuple(range(20))):
        count: list[int] = []
        samples = sample(
            counting(count),
            params,
            jax.random.split(jax.random.key(2), (3, 4)),
            contexts(3, 1, 6),
            Sampling(temperature=1.0),
            length=20,
            eos=eos,
        )
        jax.effects_barrier()
        assert len(count) == int(samples.mask.sum(-1).max())
        if eos:
            assert len(count) < 20


@pytest.mark.parametrize("options", [{}, {"slots": 3}])
def test_one_trace_whatever_the_values(params, options):
    traces = []

    @jax.jit
    def traced(params, keys, context, sampling):
        traces.append(1)
        return sample(MODEL, params, keys, context, sampling, length=4, eos=EOS, **options)

    keys, context = jax.random.split(jax.random.key(0), (2, 4)), contexts(2, 1, 5)
    texts = set()
    for temperature, top_p, top_k in ((1.0, 1.0, 0), (0.5, 0.9, 0), (0.0, 1.0, -1), (2.0, 0.5, 3)):
        sampling = Sampling(temperature=jnp.array(temperature), top_p=jnp.array(top_p), top_k=jnp.array(top_k))
        texts.add(np.asarray(traced(params, keys, context, sampling).tokens).tobytes())
    assert len(traces) == 1 and len(texts) > 2


@pytest.mark.parametrize("options", [{}, {"slots": 3}])
def test_vmap_over_seeds_equals_one_at_a_time(params, options):
    keys = jax.random.split(jax.random.key(4), (3, 2, 4))
    context = jax.vmap(lambda i: jax.tree.map(lambda x: jnp.roll(x, i, 0), contexts(2, 1, 6)))(jnp.arange(3))
    weights = jax.tree.map(lambda x: jnp.stack([x, x * 0.9, x * 1.1]), params)
    sampling = Sampling(temperature=jnp.array([0.8, 1.0, 1.2]), top_p=jnp.array([0.9, 1.0, 0.8]))
    one = functools.partial(sample, MODEL, length=10, eos=EOS, **options)
    got = jax.jit(jax.vmap(one))(weights, keys, context, sampling)
    assert len(set(np.asarray(got.mask.sum(-1).max(-1).max(-1)).tolist())) > 0
    for i in range(3):
        alone = jax.jit(one)(*jax.tree.map(lambda x, i=i: x[i], (weights, keys, context, sampling)))
        np.testing.assert_array_equal(got.tokens[i], alone.tokens)
        np.testing.assert_array_equal(got.mask[i], alone.mask)
        np.testing.assert_array_equal(got.truncated[i], alone.truncated)
        np.testing.assert_allclose(got.logp[i], alone.logp, atol=1e-5)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


def test_the_counter_of_a_vmapped_loop_is_not_batched(params):
    """A counter per member would turn every write to the cache into a scatter."""
    keys = jax.random.split(jax.random.key(4), (3, 2, 4))
    one = functools.partial(sample, MODEL, context=contexts(2, 1, 6), sampling=Sampling(), length=10, eos=EOS)
    program = jax.make_jaxpr(jax.vmap(lambda k: one(params, k)))(keys)
    names = {equation.primitive.name for equation in equations(program.jaxpr)}
    assert "dynamic_update_slice" in names and "scatter" not in names


@pytest.mark.parametrize("options", [{}, {"slots": 3}])
def test_no_rows(params, options):
    keys, context = jax.random.split(jax.random.key(0), (2, 4)), contexts(2, 1, 6)
    for b, g in ((0, 4), (2, 0)):
        samples = program(5, **options)(params, keys[:b, :g], jax.tree.map(lambda x, b=b: x[:b], context), Sampling())
        assert samples.tokens.shape == (b, g, 5) and samples.truncated.shape == (b, g)


def test_context_of_one_token(params):
    one = Context(tokens=jnp.full((2, 1, 1), 3), mask=jnp.ones((2, 1, 1), bool))
    context, samples = run(params, b=2, context=one)
    sampling = Sampling(temperature=1.0)
    np.testing.assert_allclose(samples.logp, rescored(params, context, samples, sampling)[1], atol=1e-5)


def test_arguments_that_do_not_fit_are_named(params):
    keys, context = jax.random.split(jax.random.key(0), (2, 4)), contexts(2, 3, 6)
    with pytest.raises(ValueError, match="C a divisor of G=4"):
        sample(MODEL, params, keys, context, Sampling(), length=5)
    with pytest.raises(ValueError, match="slots"):
        sample(MODEL, params, keys, contexts(2, 1, 6), Sampling(), length=5, slots=0)
    with pytest.raises(ValueError, match="stop"):
        sample(MODEL, params, keys, contexts(2, 1, 6), Sampling(), length=5, stop=((),))


def test_bfloat16_gap_between_sampled_and_rescored_is_small(params):
    """Rounding makes them differ; how far is what training logs each step."""
    wide = dataclasses.replace(CONFIG, dtype=jnp.bfloat16)
    model = transformer(wide)
    keys, context = jax.random.split(jax.random.key(2), (3, 4)), contexts(3, 1, 6)
    samples = sample(model, params, keys, context, Sampling(), length=8)
    prefix, offset, last = prefix_of(jax.tree.map(lambda x: x[:, 0], context))
    hidden = model.hidden(params, prefix, offset, inputs_of(last, samples.tokens, samples.mask), samples.mask)
    logp, _ = log_prob(model.logits(params, hidden), samples.tokens, Sampling())
    gap = np.abs(logp - samples.logp)
    assert 0 < gap.mean() < 0.05 and gap.max() < 0.5


def test_a_growing_cache_changes_no_text(params, monkeypatch):
    context, whole = run(params, length=11, eos=(1, 2))
    monkeypatch.setattr(sampler, "SHORTEST", 2)
    assert sampler._segments(11) == [3, 6, 9, 11]
    keys, sampling = jax.random.split(jax.random.key(2), (3, 4)), Sampling(temperature=1.0, top_k=0)
    pieces = jax.jit(lambda p: sample(MODEL, p, keys, context, sampling, length=11, eos=(1, 2)))(params)
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    np.testing.assert_array_equal(pieces.mask, whole.mask)
    np.testing.assert_array_equal(pieces.truncated, whole.truncated)
    np.testing.assert_allclose(pieces.logp, whole.logp, atol=1e-5)
