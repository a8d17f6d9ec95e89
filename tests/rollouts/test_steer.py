"""Rows that continue others inside the decoding loop, and tokens that somebody chose."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts import sampler
from jaxrl_llm.rollouts.distribution import draw, log_prob
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling, Steer

VOCAB, B, G, T, EOS = 24, 2, 3, 8, (1, 2)
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
SAMPLING = Sampling(temperature=0.8, top_p=jnp.broadcast_to(jnp.array([1.0, 0.9, 0.95]), (B, G)))
OWN = jnp.broadcast_to(jnp.arange(G), (B, G))


@pytest.fixture(scope="module")
def params():
    weights = MODEL.init(jax.random.key(0))
    return {**weights, "lm_head": weights["lm_head"] * 10}


def run(params, *, keys=KEYS, context=CONTEXT, **options):
    one = functools.partial(sample, MODEL, length=T, **{"eos": EOS, **options})
    return jax.jit(lambda p: one(p, keys, context, SAMPLING))(params)


def by_plan(plan):
    """A steer that follows `plan {t: (source [B G], token [B G])}`, and lets the rows be in other steps."""
    sources = jnp.stack([jnp.asarray(plan[t][0]) if t in plan else OWN for t in range(T)])
    tokens = jnp.stack([jnp.asarray(plan[t][1]) if t in plan else jnp.full((B, G), -1) for t in range(T)])
    return Steer(apply=lambda memory, seen: (memory, sources[seen.t], tokens[seen.t]))


NOTHING = by_plan({})
# Row 2 continues row 0 with token 7 and row 1 is given token 9; nothing else happens.
FORK = by_plan({3: ([[0, 1, 0]] * B, [[-1, 9, 7]] * B)})


@pytest.fixture(scope="module")
def free(params):
    return run(params, eos=())


@pytest.fixture(scope="module")
def fork(params):
    return run(params, eos=(), steer=FORK)


def rescored(params, samples):
    flat = jax.tree.map(lambda x: x[:, 0], CONTEXT)
    prefix, offset, last = prefix_of(flat)
    hidden = MODEL.hidden(params, prefix, offset, inputs_of(last, samples.tokens, samples.mask), samples.mask)
    logits = MODEL.logits(params, hidden)
    each = jax.tree.map(lambda x: jnp.broadcast_to(x, (B, G))[..., None], SAMPLING)
    return (logits, *log_prob(logits, samples.tokens, each))


@pytest.mark.parametrize("options", [{}, {"eos": ()}, {"until": lambda ended: ended.sum() >= 3}])
def test_a_steer_that_changes_nothing_is_none_to_the_last_bit(params, options):
    want, got = run(params, **options), run(params, steer=NOTHING, **options)
    for name in ("tokens", "mask", "truncated", "logp", "entropy"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)


def test_a_row_that_forks_has_the_past_of_the_other_and_is_scored_like_any(params, free, fork):
    assert (free.tokens[:, 0, :3] != free.tokens[:, 2, :3]).any(-1).all()
    for name in ("tokens", "logp", "entropy"):
        got, was = getattr(fork, name), getattr(free, name)
        if name == "tokens":
            np.testing.assert_array_equal(got[:, 0], was[:, 0])
            np.testing.assert_array_equal(got[:, 1, :3], was[:, 1, :3])
            np.testing.assert_array_equal(got[:, 2, :3], was[:, 0, :3])
        else:
            np.testing.assert_allclose(got[:, 0], was[:, 0], atol=1e-5)
            np.testing.assert_allclose(got[:, 2, :3], was[:, 0, :3], atol=1e-5)
    assert (fork.tokens[:, 2, 3] == 7).all() and (fork.tokens[:, 1, 3] == 9).all()
    assert fork.mask.all() and (fork.tokens[:, 2, 4:] != fork.tokens[:, 0, 4:]).any()
    _, logp, entropy = rescored(params, fork)
    own = np.ones((B, G, T), bool)
    own[:, 2, :3] = False  # recorded under the sampling of the row they were sampled in
    np.testing.assert_allclose(fork.logp[own], logp[own], atol=1e-5)
    np.testing.assert_allclose(fork.entropy[own], entropy[own], atol=1e-5)


def test_what_a_forked_row_draws_is_what_its_own_noise_draws_from_the_others_logits(params, free):
    """Without a given token the row draws: its key, its sampling, the other's past."""
    got = run(params, eos=(), steer=by_plan({3: ([[0, 1, 0]] * B, [[-1] * G] * B)}))
    logits = rescored(params, got)[0]
    np.testing.assert_array_equal(got.tokens[:, 2, :3], free.tokens[:, 0, :3])
    steps = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(KEYS[:, 2], jnp.arange(T))
    numbers = sampler.uniform(steps)
    want = draw(numbers, logits[:, 2], Sampling(temperature=0.8, top_p=0.95))[0]
    np.testing.assert_array_equal(got.tokens[:, 2, 3:], want[:, 3:])


def test_a_cache_that_grows_is_copied_too(params, fork, monkeypatch):
    monkeypatch.setattr(sampler, "SHORTEST", 2)
    assert sampler._segments(T) == [2, 4, 6, 8]
    pieces = run(params, eos=(), steer=FORK)
    np.testing.assert_array_equal(pieces.tokens, fork.tokens)
    np.testing.assert_allclose(pieces.logp, fork.logp, atol=1e-5)


def test_under_vmap_each_member_has_its_own_plan(params, free, fork):
    """One forks, the other does not."""

    def one(source, token):
        def apply(memory, seen):
            return memory + 1, jnp.where(seen.t == 3, source, OWN), jnp.where(seen.t == 3, token, -1)

        steer = Steer(init=lambda shape: jnp.zeros((), int), apply=apply)
        return sample(MODEL, params, KEYS, CONTEXT, SAMPLING, length=T, steer=steer)

    source, token = jnp.array([[0, 1, 0]] * B), jnp.array([[-1, 9, 7]] * B)
    both = jax.jit(jax.vmap(one))(jnp.stack([source, OWN]), jnp.stack([token, -jnp.ones_like(token)]))
    for got, want in ((0, fork), (1, free)):
        np.testing.assert_array_equal(both.tokens[got], want.tokens)
        np.testing.assert_allclose(both.logp[got], want.logp, atol=1e-5)


def test_a_row_of_nobody_is_empty_until_it_continues_another(params, free):
    nobody = [[0, -1, 2]] * B
    gone = run(params, eos=(), steer=by_plan({4: (nobody, [[-1] * G] * B)}))
    assert not gone.mask[:, 1].any() and gone.truncated[:, 1].all()
    for x in (gone.tokens, gone.logp, gone.entropy):
        assert not x[:, 1].any()
    np.testing.assert_array_equal(gone.tokens[:, ::2], free.tokens[:, ::2])
    back = run(params, eos=(), steer=by_plan({0: (nobody, [[-1] * G] * B), 5: ([[0, 2, 2]] * B, [[-1, 4, -1]] * B)}))
    assert back.mask.all()
    np.testing.assert_array_equal(
        back.tokens[:, 1, :6], np.pad(free.tokens[:, 2, :5], [(0, 0), (0, 1)], constant_values=4)
    )
    # Nobody at all: the loop ends.
    assert not run(params, steer=by_plan({2: ([[-1] * G] * B, [[-1] * G] * B)})).mask.any()


def test_a_given_token_may_end_a_row_and_what_ended_stays_as_it_is(params, free):
    end = next(i for i in range(VOCAB) if not (free.tokens == i).any())
    plan = {2: (OWN, [[end, -1, -1]] * B), 3: ([[0, 0, 2]] * B, [[5, 5, -1]] * B), 5: (OWN, [[6, 6, -1]] * B)}
    got = run(params, eos=(end,), steer=by_plan(plan))
    for row in (0, 1):  # row 1 took over what row 0 had, its end included
        np.testing.assert_array_equal(got.mask[:, row], np.arange(T) < np.full((B, 1), 3))
        np.testing.assert_array_equal(got.tokens[:, row, :3], np.append(free.tokens[:, 0, :2], [[end]] * B, 1))
        assert not got.truncated[:, row].any()


def test_stop_sequences_are_found_in_the_past_that_was_taken_over(params):
    """Row 2's token 9 follows row 0's token 8."""
    plan = {2: (OWN, [[8, 3, 3]] * B), 3: ([[0, 1, 0]] * B, [[3, 9, 9]] * B)}
    got = run(params, eos=(), stop=((8, 9),), steer=by_plan(plan))
    np.testing.assert_array_equal(got.mask.sum(-1)[:, 2], [4] * B)
    assert not got.truncated[:, 2].any() and (got.mask.sum(-1)[:, 1] > 4).all()


def test_a_limit_belongs_to_the_place(params):
    plan = {2: ([[0, 0, 0]] * B, [[-1] * G] * B), 6: ([[0, 0, 0]] * B, [[-1] * G] * B)}
    got = run(params, eos=(), limit=jnp.array([[8, 5, 0]] * B), steer=by_plan(plan))
    np.testing.assert_array_equal(got.mask.sum(-1), [[8, 6, 6]] * B)


def test_what_it_sees(params, free):
    """Logits without temperature, the tokens so far, and who goes on."""
    seen = []

    def apply(memory, step):
        jax.debug.callback(seen.append, step, ordered=True)
        return memory, OWN, jnp.full((B, G), -1)

    run(params, eos=(), limit=jnp.array([[8, 8, 2]] * B), steer=Steer(apply=apply), slots=1)
    jax.effects_barrier()
    logits = rescored(params, free)[0]
    assert [int(x.t) for x in seen] == list(range(T))
    for t, x in enumerate(seen):
        np.testing.assert_array_equal(x.alive, [[True, True, t < 2]] * B)
        np.testing.assert_allclose(x.logits[:, :2], logits[:, :2, t], atol=1e-4)
        np.testing.assert_array_equal(x.tokens[:, :2, :t], free.tokens[:, :2, :t])
        np.testing.assert_array_equal(x.mask[:, :2], jnp.broadcast_to(jnp.arange(T) < t, (B, 2, T)))


def test_rows_of_several_contexts_do_not_continue_each_other(params):
    context = jax.tree.map(lambda x: jnp.repeat(x, G, axis=1), CONTEXT)
    with pytest.raises(ValueError, match="C=3"):
        run(params, context=context, steer=NOTHING)
