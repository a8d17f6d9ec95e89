"""The sampler's limit per row, its early stop for all, and responses that go on."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts.ending import Ending
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

VOCAB, B, G, T = 24, 2, 3, 8
MODEL = transformer(
    TransformerConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
    )
)
KEYS = jax.random.split(jax.random.key(3), (B, G))
CONTEXT = Context(
    tokens=jax.random.randint(jax.random.key(2), (B, 1, 4), 0, VOCAB),
    mask=jnp.arange(4) < jnp.array([[[2]], [[4]]]),
)
SLOTS: list[dict[str, Any]] = [{}, {"slots": 1}, {"slots": 4}]


@pytest.fixture(scope="module")
def params():
    weights = MODEL.init(jax.random.key(0))
    return {**weights, "lm_head": weights["lm_head"] * 10}


def run(params, *, context=CONTEXT, keys=KEYS, length=T, limit=None, own=None, **options):
    one = functools.partial(sample, MODEL, length=length, **options)
    return jax.jit(lambda p, c, l, o: one(p, keys, c, Sampling(), limit=l, own=o))(params, context, limit, own)


@pytest.fixture(scope="module")
def free(params):
    return run(params, eos=(1, 2))


@pytest.mark.parametrize("options", SLOTS)
def test_a_row_has_no_more_tokens_than_its_limit(params, free, options):
    limit = jnp.array([[0, 3, 20], [8, 1, 5]])
    got = run(params, eos=(1, 2), limit=limit, **options)
    length = np.minimum(free.mask.sum(-1), limit)
    np.testing.assert_array_equal(got.mask, np.arange(T) < length[..., None])
    for name in ("tokens", "logp", "entropy"):
        want = np.where(got.mask, getattr(free, name), 0)
        np.testing.assert_allclose(getattr(got, name), want, atol=1e-5)
    # A row that ends with the last token it may have has ended.
    np.testing.assert_array_equal(got.truncated, np.asarray(free.truncated) | (length < free.mask.sum(-1)))
    assert got.truncated[0, 0]


@pytest.mark.parametrize("options", SLOTS)
def test_ending_with_the_last_token_of_the_limit_is_not_truncated(params, free, options):
    ended = run(params, eos=tuple(range(VOCAB)), limit=jnp.ones((B, G), int), **options)
    assert ended.mask.sum() == B * G and not ended.truncated.any()


@pytest.mark.parametrize("options", SLOTS)
def test_limits_of_nothing(params, options):
    got = run(params, limit=jnp.zeros((B, G), int), **options)
    assert not got.mask.any() and got.truncated.all() and not got.tokens.any() and not got.logp.any()


def test_until_stops_every_row_where_it_is(params, free):
    lengths = np.asarray(free.mask.sum(-1))
    ends = np.sort(lengths[~np.asarray(free.truncated)])
    assert len(ends) >= 2 and ends[1] < lengths.max()

    def two(ended):
        assert ended.shape == (B, G)
        return ended.sum() >= 2

    for options in SLOTS:
        got = run(params, eos=(1, 2), until=two, **options)
        np.testing.assert_array_equal(got.mask.sum(-1), np.minimum(lengths, ends[1]))
        np.testing.assert_array_equal(got.truncated, np.asarray(free.truncated) | (lengths > ends[1]))
        np.testing.assert_array_equal(got.tokens, np.where(got.mask, free.tokens, 0))


def test_until_counts_rows_at_their_limit_and_those_without_any_token(params):
    limit = jnp.array([[0, 2, 8], [8, 8, 8]])
    got = run(params, limit=limit, until=lambda ended: ended.sum() >= 2)
    np.testing.assert_array_equal(got.mask.sum(-1), [[0, 2, 2], [2, 2, 2]])
    got = run(params, limit=limit, until=lambda ended: ended.sum() >= 1)
    assert not got.mask.any()


def test_until_under_vmap_stops_each_member_by_itself(params):
    limit = jnp.array([[[1, 2, 8], [8, 8, 8]], [[4, 5, 8], [8, 8, 8]]])

    def one(limit):
        def until(ended):
            return ended.sum() >= 2

        return sample(MODEL, params, KEYS, CONTEXT, Sampling(), length=T, limit=limit, until=until)

    both = jax.jit(jax.vmap(one))(limit)
    np.testing.assert_array_equal(both.mask.sum(-1), [[[1, 2, 2], [2, 2, 2]], [[4, 5, 5], [5, 5, 5]]])
    np.testing.assert_array_equal(both.tokens[0], jax.jit(one)(limit[0]).tokens)


@pytest.mark.parametrize("options", SLOTS)
def test_a_stop_sequence_may_begin_before_the_response_goes_on(params, options):
    """The sequence is the context's last token and the first one sampled."""
    first = run(params, length=1).tokens[..., 0]
    last = CONTEXT.tokens[jnp.arange(B), 0, CONTEXT.mask.sum(-1)[:, 0] - 1]
    stop = ((int(last[1]), int(first[1, 0])),)
    for own, ends in ((None, False), (jnp.array([[0], [0]]), False), (jnp.array([[1], [1]]), True)):
        got = run(params, stop=stop, own=own, **options)
        assert (got.mask[1, 0].sum() == 1 and not got.truncated[1, 0]) == ends


def test_what_a_response_ends_with_before_it_goes_on():
    ending = Ending(stop=((5, 6, 7),))
    context = Context(tokens=jnp.array([[1, 2, 3, 9], [4, 9, 9, 9]]), mask=jnp.arange(4) < jnp.array([[3], [1]]))
    after = functools.partial(ending.after, context)
    np.testing.assert_array_equal(after(jnp.array([3, 1])), [[1, 2, 3], [-1, -1, 4]])
    np.testing.assert_array_equal(after(jnp.array([2, 0])), [[-1, 2, 3], [-1, -1, -1]])
    assert Ending().after(context, jnp.array([1, 1])).shape == (2, 0)
