"""Dynamic sampling against a world whose prompts are informative or not by their index."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.filters.basic import informative
from jaxrl_llm.rollouts.dynamic import sample_until_informative
from jaxrl_llm.testing import toy_batch, toy_prompts
from jaxrl_llm.types import World

G, T = 3, 2


def make(correct, *, counted=None):
    """A world where the first `correct[index]` rows of a prompt's group are right. NaN: cannot be scored."""
    correct = jnp.asarray(correct, jnp.float32)

    def sample(key, prompts, size):
        if counted is not None:
            jax.debug.callback(lambda index: counted.append(index.tolist()), prompts.index)
        b = prompts.index.shape[0]
        rollouts = toy_batch(logp=-jax.random.uniform(key, (b, size, T))).rollouts
        tokens = jnp.broadcast_to(prompts.index[:, None, None], (b, size, T)).astype(jnp.int32)
        context = jax.tree.map(lambda x: x[:, None], prompts.context)
        return dataclasses.replace(rollouts, prompts=prompts, context=context, tokens=tokens)

    def reward(rollouts):
        n = correct[rollouts.prompts.index][:, None]
        return jnp.where(jnp.isnan(n), jnp.nan, (jnp.arange(G) < n).astype(jnp.float32))

    return World(sample=sample, score=None, reward=reward, models={}, step=jnp.asarray(0), length=3)


def run(correct, *, rounds, counted=None, jit=True):
    prompts = toy_prompts(len(correct))
    world = make(correct, counted=counted)

    def fn(key):
        return sample_until_informative(world, key, prompts, size=G, rounds=rounds)

    got = (jax.jit(fn) if jit else fn)(jax.random.key(0))
    jax.effects_barrier()
    return got


def useful(got):
    batch = toy_batch(logp=got.logp, outcome=got.outcome)
    return np.asarray(got.prompts.index)[np.asarray(informative(batch)[:, 0])].tolist()


def test_fills_up_from_later_chunks_and_never_keeps_a_useless_group_it_could_replace():
    got = run([0, 1, 3, 0, 2, 1, 1, 1], rounds=4)
    assert got.tokens.shape == (2, G, T)
    assert useful(got) == [1, 4]
    std = np.asarray(got.outcome).std(-1)
    assert (std > 0).all()


def test_stops_sampling_when_full():
    counted = []
    run([1, 2, 1, 1, 1, 1], rounds=3, counted=counted)
    assert counted == [[0, 1]]
    counted.clear()
    run([0, 2, 0, 0, 1, 1], rounds=3, counted=counted)
    assert counted == [[0, 1], [2, 3], [4, 5]]


def test_runs_out_and_leaves_useless_but_real_groups():
    got = run([0, 0, 3, 1, 0, 0], rounds=3)
    assert useful(got) == [3]
    assert got.mask.all() and got.context.mask.all()
    assert len(set(got.prompts.index.tolist())) == 2


def test_prompts_context_and_tokens_stay_together():
    got = run([0, 1, 3, 0, 2, 1, 1, 1], rounds=2)
    index = got.prompts.index
    np.testing.assert_array_equal(got.tokens[:, 0, 0], index)
    np.testing.assert_array_equal(got.prompts.target, index)
    np.testing.assert_array_equal(got.context.tokens[:, 0, 0], 2 * index)
    np.testing.assert_array_equal(got.prompts.context.tokens[:, 0], 2 * index)


def test_rounds_are_drawn_with_different_keys():
    got = run([0, 1, 0, 1], rounds=2)
    assert useful(got) == [1, 3]
    assert (np.asarray(got.logp[0]) != np.asarray(got.logp[1])).all()


def test_one_round_samples_everything():
    got = run([0, 1, 3, 0], rounds=1)
    assert sorted(got.prompts.index.tolist()) == [0, 1, 2, 3] and useful(got) == [1]


def test_rows_without_a_score_make_no_group_informative():
    got = run([jnp.nan, 0, 1, 1], rounds=2)
    assert useful(got) == [2, 3]
    assert useful(run([jnp.nan, 0, 3, 1], rounds=2)) == [3]


def test_vmap_over_keys_is_one_by_one():
    prompts, world = toy_prompts(4), make([0, 1, 1, 1])

    def fn(key):
        return sample_until_informative(world, key, prompts, size=G, rounds=2)

    keys = jax.random.split(jax.random.key(0), 2)
    both = jax.vmap(fn)(keys)
    for i in range(2):
        one = jax.jit(fn)(keys[i])
        jax.tree.map(lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), both, one)


def test_jit_is_no_jit():
    a, b = run([0, 1, 3, 1], rounds=2), run([0, 1, 3, 1], rounds=2, jit=False)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("rounds", [0, 3])
def test_prompts_must_divide(rounds):
    with pytest.raises(ValueError, match=f"4 prompts do not divide into rounds={rounds}"):
        run([0, 1, 1, 1], rounds=rounds)
