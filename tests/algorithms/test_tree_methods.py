"""Methods that branch: what a part of a response is worth, from several ways to go on after it."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages.gae import gae
from jaxrl_llm.advantages.group import center, center_scale
from jaxrl_llm.advantages.sets import in_window, same_tokens, set_advantage, set_credit
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.polychromic import from_old, kl_from_old
from jaxrl_llm.algorithms.spo_chain import sample_segments, segment_credit, segment_starts
from jaxrl_llm.algorithms.spo_tree import grow_and_draw, no_trees
from jaxrl_llm.algorithms.treepo import by_size, equally, per_subtree, subtree_credit
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.rollouts.forks import forks, sample_forking
from jaxrl_llm.rollouts.tree import Shape, edge_credit, edge_rows, edge_values, sample_tree
from jaxrl_llm.rollouts.vines import sample_vines
from jaxrl_llm.testing import compiled, evaluate, prepare, random_batch, toy_batch, toy_rows, toy_world
from jaxrl_llm.types import POLICY, PREFIX, Problem, Rollouts, Sampling, Scores

B, T, SAMPLING = 3, 8, Sampling(temperature=jnp.ones(()))


@pytest.fixture(scope="module")
def params(policy):
    return policy.init(jax.random.key(0))


@pytest.fixture(scope="module")
def world(policy, letters, params):
    """About every fifth token ends a response; its reward is its length."""
    task = dataclasses.replace(letters, stop=tuple((i,) for i in range(10, 22)))
    return toy_world(policy, task, params, length=T, step=0, sampling=SAMPLING, reward=lengths)


def lengths(rollouts: Rollouts):
    return rollouts.mask.sum(-1).astype(jnp.float32)


@pytest.fixture(scope="module")
def prompts(letters):
    return letters.draw(jax.random.key(4), B)


def with_rollouts(batch, **fields):
    return dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, **fields))


def run(algorithm, scores, batch):
    batch = prepare(algorithm, batch)
    got = evaluate(algorithm.loss, scores, batch)
    return np.asarray(got.value), np.asarray(got.coefficient) / np.maximum(np.asarray(batch.mask).sum(), 1)


def same(child, parent, scores, batch):
    (value, gradient), (want, want_gradient) = run(child, scores, batch), run(parent, scores, batch)
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-4, atol=1e-7)
    assert (gradient != 0).any()


# --- spo_chain --------------------------------------------------------------------------------------------------------

PROBABILITIES = np.array([0.99, 0.95, 0.5, 0.97, 0.3, 0.99, 0.85, 0.99, 0.6, 0.99])


starts_program = jax.jit(segment_starts, static_argnames=("threshold", "interval"))


@pytest.mark.parametrize("fill", [0.0, np.nan, 1e10, -1e10])
def test_segments_start_at_unsure_tokens(fill):
    """The states before the tokens 2, 4, 6, 8 are those after 1, 3, 5, 7; every second one is kept."""
    logp = np.append(np.log(PROBABILITIES), fill)
    mask = np.arange(11) < 10
    starts = partial(starts_program, logp, mask)
    np.testing.assert_array_equal(np.flatnonzero(starts(threshold=0.9, interval=1)), [2, 4, 6, 8])
    np.testing.assert_array_equal(np.flatnonzero(starts(threshold=0.9, interval=2)), [2, 6])
    assert not np.asarray(starts(threshold=0.2, interval=1)).any()


def test_credit_of_segments():
    """Values 0.25 and 0.5 of the states before the tokens 2 and 6, and R = 1; tokens before the first have none."""
    credit = compiled(segment_credit)
    starts = np.isin(np.arange(10), [2, 6])
    got = credit(starts, np.array([0.25, 0.5, 7.0]), np.array(1.0))
    np.testing.assert_allclose(got, [0, 0, 0.25, 0.25, 0.25, 0.25, 0.5, 0.5, 0.5, 0.5])
    assert got[2] + got[6] == 1 - 0.25  # they telescope
    one = credit(np.arange(10) == 0, np.array([0.25, 7.0]), np.array(1.0))
    np.testing.assert_allclose(one, [0.75] * 10)  # the plain baseline of a prompt
    np.testing.assert_array_equal(credit(np.zeros(10, bool), np.zeros(2), np.array(1.0)), [0] * 10)
    unknown = credit(starts, np.array([0.25, np.nan, 7.0]), np.array(1.0))
    np.testing.assert_array_equal(unknown, [0] * 10)


@pytest.fixture(scope="module")
def chain_rollouts(world, prompts):
    """A completion's reward is its length, so that the value of a state is known to be more than its own length."""
    sample = partial(sample_segments, size=2, interval=3, completions=4, threshold=0.9)
    return jax.jit(lambda key: sample(world, key, prompts))(jax.random.key(1))


def test_segments_of_a_policy(chain_rollouts):
    rollouts = chain_rollouts
    mask, credit = np.asarray(rollouts.mask), np.asarray(rollouts.credit)
    np.testing.assert_array_equal(rollouts.outcome, lengths(rollouts))
    values = 0
    for row in np.ndindex(mask.shape[:2]):
        unsure = np.flatnonzero(mask[row] & (np.exp(np.asarray(rollouts.logp[row])) < 0.9))
        begin = [*unsure[::3], mask[row].sum()]
        assert not credit[row][: begin[0]].any() and not credit[row][begin[-1] :].any()
        # Backwards from the outcome: values are means of four lengths, each longer than the state and at most T.
        after = float(rollouts.outcome[row])
        for first, end in zip(begin[-2::-1], begin[:0:-1], strict=True):
            assert (credit[row][first:end] == credit[row][first]).all()
            after -= credit[row][first]
            assert first + 1 <= after <= T and (4 * after) % 1 < 1e-4
            values += 1
    assert values >= 6 and (credit != 0).any()


def test_completions_are_counted(chain_rollouts):
    sampled, own = np.asarray(chain_rollouts.generated), np.asarray(chain_rollouts.mask.sum((-2, -1)))
    assert (sampled >= own + 4 * 2).all()


@pytest.mark.parametrize("fill", [0.0, jnp.nan, 1e10])
def test_spo_chain_learns_from_unsure_tokens_only(fill):
    """Probabilities at sampling: row 0 has 0.95, 0.5, 0.3, row 1 has 0.99, 0.2. Shares are of the three unsure ones."""
    logp = jnp.log(jnp.array([[[0.95, 0.5, 0.3], [0.99, 0.2, 1.0]]])).at[0, 1, 2].set(fill)
    scores, batch = toy_rows(logp=logp, fill=fill)
    batch = with_rollouts(batch, credit=jnp.array([[[9.0, 1.0, 1.0], [9.0, -2.0, fill]]]))
    on_policy = dataclasses.replace(scores, logp=logp)
    algorithm = load("spo_chain", kl=None, whitened=False)
    ready = prepare(algorithm, batch)
    np.testing.assert_array_equal(ready.mask[0], [[0, 1, 1], [0, 1, 0]])
    got = evaluate(algorithm.loss, on_policy, ready)
    np.testing.assert_allclose(got.coefficient[0], [[0, -1, -1], [0, 2, 0]], rtol=1e-5)
    # Whitened over the same tokens: mean 0, variance 3.
    whitened = prepare(load("spo_chain", kl=None), batch)
    np.testing.assert_allclose(
        jnp.where(whitened.mask, whitened.advantage, 0)[0], np.array([[0, 1, 1], [0, -2, 0]]) / np.sqrt(3), rtol=1e-5
    )


def test_spo_chain_sums_the_divergence_over_a_row_and_averages_over_all_rows():
    """Row 1 has no unsure token, and counts all the same."""
    logp = jnp.log(jnp.array([[[0.95, 0.5, 0.3], [0.99, 0.99, 1.0]]]))
    scores, batch = toy_rows(logp=logp)
    batch = with_rollouts(batch, credit=jnp.zeros((1, 2, 3)))
    algorithm = load("spo_chain", kl=0.5, whitened=False)
    got = evaluate(algorithm.loss, scores, prepare(algorithm, batch))
    d = np.array([-1.1 + 0.9, -1.5 + 1.8])  # l - l_ref of the two unsure tokens
    np.testing.assert_allclose(got.value, 0.5 * np.sum(np.exp(-d) + d - 1) / 2, rtol=1e-5)
    far = dataclasses.replace(batch, reference=Scores(logp=scores.logp + 15))
    np.testing.assert_allclose(evaluate(algorithm.loss, scores, prepare(algorithm, far)).value, 0.5 * 2e4 / 2)


def test_spo_chain_skips_a_step_whose_ratios_are_far():
    logp = jnp.full((1, 2, 3), -3.0)
    batch = with_rollouts(toy_batch(logp=logp, reference=logp), credit=-jnp.ones((1, 2, 3)))
    algorithm = load("spo_chain", whitened=False)
    ready = prepare(algorithm, batch)
    near = evaluate(algorithm.loss, Scores(logp=logp + np.log(9.9)), ready)
    np.testing.assert_allclose(near.coefficient, jnp.full((1, 2, 3), 9.9), rtol=1e-2)
    far = evaluate(algorithm.loss, Scores(logp=logp + np.log(10.1)), ready)
    assert far.value == 0 and not far.coefficient.any()


def test_spo_chain_is_the_centred_policy_gradient():
    """One segment a row, the value of whose prompt is the mean of the group."""
    scores, batch = random_batch(jax.random.key(1))
    parent = load("grpo", kl=None)
    parent = dataclasses.replace(parent, advantage=load("dr_grpo").advantage)
    parent = dataclasses.replace(parent, loss=dataclasses.replace(parent.loss, aggregate=token_mean))
    batch = with_rollouts(batch, credit=prepare(parent, batch).advantage)
    same(load("spo_chain", kl=None, whitened=False, threshold=1.1), parent, scores, batch)
    with pytest.raises(AssertionError):
        same(load("spo_chain", kl=None, whitened=False, threshold=0.5), parent, scores, batch)


def test_spo_chain_refuses_sizes():
    with pytest.raises(ValueError, match="interval and completions must be at least 1, got 0 and 9"):
        load("spo_chain", interval=0)


# --- spo_tree ---------------------------------------------------------------------------------------------------------

THREES = Shape(branch=(3, 3), segment=2)
OUTCOMES = jnp.array([1.0, 0, 0, 1, 1, 0, 0, 0, 0])


def test_values_and_credit_of_edges():
    values = edge_values(OUTCOMES, shape=THREES)
    np.testing.assert_allclose(values[:3], [1 / 3, 2 / 3, 0], rtol=1e-6)
    np.testing.assert_array_equal(values[3:], OUTCOMES)
    plain = np.asarray(edge_credit(values, shape=THREES, gain=center))
    np.testing.assert_allclose(plain[:3], [0, 1 / 3, -1 / 3], atol=1e-6)
    np.testing.assert_allclose(plain[3:6], [2 / 3, -1 / 3, -1 / 3], atol=1e-6)
    np.testing.assert_allclose(plain[3:].reshape(3, 3).sum(-1), [0, 0, 0], atol=1e-6)
    assert (plain[9:] == 0).all()
    scaled = edge_credit(values, shape=THREES, gain=partial(center_scale, ddof=0, eps=1e-8))
    np.testing.assert_allclose(scaled[:3], [0, 1.224745, -1.224745], atol=1e-5)
    unbiased = edge_credit(values, shape=THREES, gain=center_scale)
    np.testing.assert_allclose(unbiased[:3], [0, 1, -1], atol=1e-5)


def test_leaves_without_a_score_have_no_part_in_values():
    values = edge_values(OUTCOMES.at[0].set(jnp.nan).at[6:].set(jnp.nan), shape=THREES)
    np.testing.assert_allclose(values[:3], [0, 2 / 3, jnp.nan], rtol=1e-6)
    credit = edge_credit(values, shape=THREES, gain=center)
    np.testing.assert_allclose(credit[:6], [-1 / 3, 1 / 3, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(credit[9:], [0, 0, 0])


TREE = Shape(branch=(2, 3, 2), segment=2)


@pytest.fixture(scope="module")
def leaves(world, prompts):
    return jax.jit(lambda key: sample_tree(world, key, prompts, shape=TREE))(jax.random.key(2))


def test_leaves_share_what_is_before_their_branch(leaves):
    tokens = np.where(leaves.mask, leaves.tokens, -1)
    sampled, different = np.zeros(B), B
    for width, begin, end in [(2, 0, 2), (6, 2, 4), (12, 4, T)]:
        families = tokens[..., begin:end].reshape(B, width, -1, end - begin)
        assert (families == families[:, :, :1]).all()
        sampled += (families[:, :, 0] >= 0).sum((-2, -1))
        before, different = different, len(np.unique(tokens[..., :end].reshape(-1, end), axis=0))
        assert different > before
    np.testing.assert_array_equal(leaves.generated, sampled)
    np.testing.assert_array_equal(leaves.outcome, lengths(leaves))
    np.testing.assert_array_equal(leaves.segment[0, 0], [0, 0, 1, 1, 2, 2, 2, 2])


def test_log_probs_of_leaves_are_those_of_whole_responses(world, leaves):
    scores = jax.jit(lambda x: world.score("policy", x))(leaves)
    np.testing.assert_allclose(np.where(leaves.mask, scores.logp, 0), leaves.logp, atol=1e-5)


def test_edges_are_what_a_leaf_has_at_a_depth_after_what_led_to_it(leaves):
    """Edge 2 + 4 is the fifth at depth 1, above the leaves 8 and 9; edge 2 + 6 + 11 is the last leaf's."""
    rows = edge_rows(leaves, jnp.array([[6, 19]] * B), shape=TREE)
    at = np.arange(T)
    for row, leaf, begin, end in ((0, 8, 2, 4), (1, 11, 4, T)):
        exists = np.asarray(leaves.mask)[:, leaf]
        np.testing.assert_array_equal(rows.mask[:, row], exists & (at >= begin) & (at < end))
        role = np.where(at < begin, PREFIX, POLICY) * (exists & (at < end))
        np.testing.assert_array_equal(rows.role[:, row], role)
        np.testing.assert_array_equal(np.where(role, rows.tokens[:, row], 0), np.where(role, leaves.tokens[:, leaf], 0))


def problem_of(prompts):
    example = jax.eval_shape(lambda: prompts)
    return Problem(rows=99, prompts=B, length=T, vocab=64, params={}, example=example, sampling=SAMPLING)


@pytest.fixture(scope="module")
def replayed(world, letters):
    """Five steps; the index of a prompt says its step."""
    shape = Shape(branch=(3, 2), segment=2)
    step = partial(grow_and_draw, shape=shape, edges=3, gain=center)

    def drawn(i):
        return dataclasses.replace(letters.draw(jax.random.key(i), B), index=i * B + jnp.arange(B, dtype=jnp.int32))

    apply = jax.jit(lambda memory, i: step(memory, jax.random.key(i), world, drawn(i)))
    memory, found = no_trees(problem_of(drawn(0)), shape=shape, age=3), []
    for i in range(5):
        rollouts, memory = apply(memory, jnp.int32(i))
        found.append((rollouts, memory))
    return found


def test_an_edge_is_drawn_once_and_before_it_is_too_old(replayed):
    seen = {}
    for step, (rollouts, _) in enumerate(replayed):
        assert rollouts.tokens.shape == (3 * B, 3, T)
        age = step - np.asarray(rollouts.prompts.index) // B
        rows = np.asarray(rollouts.mask).any(-1)
        if step >= 2:
            np.testing.assert_array_equal(age, np.repeat([0, 1, 2], B))
        assert (np.asarray(rollouts.credit)[rows] != 0).all()
        for group, row in np.argwhere(rows):
            name = (int(rollouts.prompts.index[group]),)
            edge = np.where(rollouts.attended[group, row], rollouts.tokens[group, row], -1)
            key = (*name, *edge.tolist(), *np.asarray(rollouts.mask[group, row]).tolist())
            seen[key] = seen.get(key, 0) + 1
        np.testing.assert_array_equal(np.asarray(rollouts.generated)[B:], 0)
    assert len(seen) > 3 * B and max(seen.values()) == 1


def test_edges_not_drawn_are_left_for_the_next_steps(replayed):
    rollouts, memory = replayed[0]
    drawn = np.asarray(rollouts.mask).any(-1).sum(-1)[:B]
    left = np.asarray(memory["left"]).sum(-1)
    assert (drawn[left[:B] > 0] == 3).all() and left[:B].any() and not left[B:].any()
    later, _ = replayed[1]
    np.testing.assert_array_equal(np.asarray(later.mask).any(-1).sum(-1)[B : 2 * B], np.minimum(left[:B], 3))


def test_a_tree_of_one_depth_is_a_group_with_its_mean_as_baseline(world, prompts):
    shape = Shape(branch=(4,), segment=9)
    memory = no_trees(problem_of(prompts), shape=shape, age=1)
    got, memory = jax.jit(lambda key: grow_and_draw(memory, key, world, prompts, shape=shape, edges=9, gain=center))(
        jax.random.key(3)
    )
    assert memory == {} and got.tokens.shape == (B, 4, T)
    length = np.asarray(got.outcome)
    credit = length - length.mean(-1, keepdims=True)
    np.testing.assert_allclose(got.credit[..., 0], credit, atol=1e-5)
    # Rows of mean length have no credit, and are not drawn; the others are whole.
    np.testing.assert_array_equal(got.mask.sum(-1), np.where(np.abs(credit) > 1e-6, length, 0))


def test_spo_tree_is_spo_chain():
    scores, batch = random_batch(jax.random.key(1))
    same(load("spo_tree"), load("spo_chain"), scores, batch)


def test_spo_tree_refuses_sizes(world, prompts):
    with pytest.raises(ValueError, match="age and edges must be at least 1, got 0 and 32"):
        load("spo_tree", age=0)
    with pytest.raises(ValueError, match="3 segments of 4 tokens needs a budget of more than 8 tokens, got 8"):
        sample_tree(world, jax.random.key(0), prompts, shape=Shape(branch=(2, 2, 2), segment=4))


# --- treepo -----------------------------------------------------------------------------------------------------------

PAIRS = np.array([[4, 0], [4, 1], [5, 2], [5, 3]], np.int32)
ALL = np.ones(4, bool)


@pytest.mark.parametrize(
    "weigh, want",
    [(equally, [0.625, -0.375, -0.125, -0.125]), (by_size, [2 / 3, -1 / 3, -1 / 6, -1 / 6])],
)
def test_credit_against_subtrees(weigh, want):
    """Rows 0, 1 and rows 2, 3 share their first segment: 0.75, -0.25 x 3 in the group, 0.5, -0.5, 0, 0 in pairs."""
    reward, credit = np.array([1.0, 0, 0, 0]), compiled(subtree_credit, weigh=weigh)
    got = credit(reward, PAIRS, np.ones((4, 2), bool), ALL)
    np.testing.assert_allclose(got, want, atol=1e-6)
    shallow = credit(reward, PAIRS, np.zeros((4, 2), bool), ALL)
    np.testing.assert_allclose(shallow, [0.75, -0.25, -0.25, -0.25], atol=1e-6)


@pytest.mark.parametrize("fill", [np.nan, 1e10])
def test_rows_that_do_not_count_are_in_no_subtree(fill):
    """Without row 1, row 0 is alone under its node: the group's mean is 1/3."""
    keep = np.array([True, False, True, True])
    got = jax.jit(subtree_credit)(np.array([1.0, fill, 0, 0]), PAIRS, np.ones((4, 2), bool), keep)
    np.testing.assert_allclose(got, [2 / 3, 0, -1 / 6, -1 / 6], atol=1e-6)


def test_credit_of_subtrees_is_whitened_over_tokens():
    """Segments of one token, and nodes as above. A node that stands after the end of a row is none."""
    mask = np.broadcast_to(np.arange(3) < 2, (1, 4, 3))
    batch = toy_batch(logp=np.zeros((1, 4, 3)), mask=mask, outcome=[[1.0, 0, 0, 0]])
    batch = with_rollouts(batch, node=jnp.asarray(np.concatenate([PAIRS, np.full((4, 1), 7, np.int32)], -1)[None]))
    credit = compiled(per_subtree, segment=1)(batch)
    np.testing.assert_allclose(credit[0, :, 0], [0.625, -0.375, -0.125, -0.125], atol=1e-6)
    np.testing.assert_array_equal(credit[..., 2], 0)
    got = compiled(whiten)(dataclasses.replace(batch, advantage=credit))
    np.testing.assert_allclose(got[0, :, 1], [1.559024, -0.935414, -0.311805, -0.311805], atol=1e-5)


def marks(*places, width=8):
    return np.isin(np.arange(width), places)


forked_rows = compiled(forks, branch=2)


@pytest.mark.parametrize(
    "done, going, ended, finished, ahead, again",
    [
        # Three go on and two ended now: 6 places, 2 * 5 branches asked for; 2 each.
        ((0, 3), (1, 2, 4), (0, 3), [0, 3], [1, 1, 2, 2, 4, 4], []),
        # One goes on and one ended now: 2 * 2 of 7 places, as if neither had.
        ((0,), (1,), (0,), [0], [1, 1, 1, 1], []),
        # Nobody ended: 2 * 2 of 7 places.
        ((5,), (2, 3), (), [5], [2, 2, 3, 3], []),
        # 5 places for three: one each, and what is left over to the last.
        ((0, 1, 2), (3, 4, 5), (1, 2), [0, 1, 2], [3, 4, 5, 5, 5], []),
        # Nobody goes on: finished rows are begun again, twice each, in order, until the places are used.
        ((1, 4, 6), (), (6,), [1, 4, 6], [], [1, 1, 4, 4, 6]),
        ((2,), (), (2,), [2], [], [2, 2]),
        # Full.
        (tuple(range(8)), (), (7,), list(range(8)), [], []),
    ],
)
def test_forks(done, going, ended, finished, ahead, again):
    got = forked_rows(marks(*done), marks(*going), marks(*ended))
    source, want = got.source, [*finished, *ahead, *again]
    assert got.exists.sum() == len(want) and source[: len(want)].tolist() == want
    assert np.flatnonzero(got.going).tolist() == list(range(len(finished), len(want)))
    assert np.flatnonzero(got.again).tolist() == list(range(len(want) - len(again), len(want)))


@pytest.fixture(scope="module")
def forked(world, prompts):
    sample = partial(sample_forking, size=8, segment=2, branch=2, first=4)
    return jax.jit(lambda key: sample(world, key, prompts))(jax.random.key(5))


def test_forked_groups_are_full_of_finished_responses(forked, world):
    assert forked.tokens.shape == (B, 8, T) and forked.mask.any(-1).all()
    lasts = np.asarray(forked.mask.sum(-1)) - 1
    tokens = np.take_along_axis(np.asarray(forked.tokens), lasts[..., None], -1)[..., 0]
    ends = ((tokens >= 10) & (tokens < 22)) | (tokens == 1)
    np.testing.assert_array_equal(forked.truncated, (lasts == T - 1) & ~ends)
    assert (ends | (lasts == T - 1)).all()
    scores = jax.jit(lambda x: world.score("policy", x))(forked)
    np.testing.assert_allclose(np.where(forked.mask, scores.logp, 0), forked.logp, atol=1e-5)


def test_rows_with_a_node_in_common_have_everything_before_it_in_common(forked):
    mask, node, tokens = (np.asarray(x) for x in (forked.mask, forked.node, forked.tokens))
    shared = 0
    for b in range(B):
        distinct = set()
        for i in range(8):
            distinct |= {(node[b, i, t], t) for t in range(T) if mask[b, i, t]}
            for j in range(i):
                both = mask[b, i] & mask[b, j] & (node[b, i] == node[b, j])
                upto = T if both.all() else int(np.argmin(both))
                assert not both[upto:].any()
                assert (tokens[b, i, :upto] == tokens[b, j, :upto]).all()
                shared += upto > 0
        assert len({tuple(np.where(mask[b, i], node[b, i], -1)) for i in range(8)}) == 8
        # What rows share was sampled once.
        assert len(distinct) == forked.generated[b]
    assert shared > B


def test_treepo_without_shared_beginnings_is_reinforce_pp_baseline():
    scores, batch = random_batch(jax.random.key(2))
    base = load("dapo")
    parent = load("reinforce_pp_baseline", kl=None)
    parent = dataclasses.replace(parent, reward=base.reward, filter=base.filter, loss=base.loss)
    same(load("treepo"), parent, scores, batch)
    node = jnp.broadcast_to(jnp.array([0, 0, 1, 1])[:, None], batch.rollouts.tokens.shape)
    with pytest.raises(AssertionError):
        same(load("treepo", segment=1), parent, scores, with_rollouts(batch, node=node))


def test_treepo_refuses_more_branches_than_responses():
    with pytest.raises(
        ValueError, match="branch <= first <= group_size, got segment=512, branch=2, first=8, group_siz"
    ):
        load("treepo", group_size=4)


# --- polychromic ------------------------------------------------------------------------------------------------------

SETS = np.array([[0, 1], [0, 2], [1, 3], [2, 3]], np.int32)
credit_of_sets = compiled(set_credit)


def labels(*names):
    return np.array([[a == b for b in names] for a in names])


@pytest.mark.parametrize(
    "reward, names, want",
    [
        # f = 0.5, 0.5, 1, 0.5: the failing row 2 has as much credit as row 0, whose set had no variety.
        ([1.0, 1, 0, 1], "aabc", [-0.125, 0.125, -0.125, 0.125]),
        ([1.0, 1, 0, 1], "aaaa", [0.5 * (1 + 0.5) / 2 - 0.375, 0.125, -0.125, 0.0]),
        ([1.0, 1, 1, 1], "aaaa", [0, 0, 0, 0]),
        ([0.0, 0, 0, 0], "abcd", [0, 0, 0, 0]),
    ],
)
def test_credit_of_sets(reward, names, want):
    got = credit_of_sets(np.array(reward), labels(*names), ALL, SETS)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("fill", [np.nan, 1e10])
def test_sets_with_a_row_that_does_not_count_are_left_out(fill):
    """Without row 2 the sets (0, 1) and (1, 3) are left: f = 0.5 and 1."""
    keep = np.array([True, True, False, True])
    got = credit_of_sets(np.array([1.0, 1, fill, 1]), labels(*"aabc"), keep, SETS)
    np.testing.assert_allclose(got, [-0.25, 0, 0, 0.25], atol=1e-6)
    none = credit_of_sets(np.array([1.0, 1, fill, 1]), labels(*"aabc"), keep, SETS[:2])
    np.testing.assert_array_equal(none, [0, 0, 0, 0])
    nobody = credit_of_sets(np.array([1.0, 1, 0, 1]), labels(*"aabc"), ALL, SETS[:1])
    np.testing.assert_array_equal(nobody, [0, 0, 0, 0])  # rows 2 and 3 are in no set


def test_the_window_is_of_tokens_that_count():
    mask = np.array([0, 1, 1, 0, 1, 1], bool)
    np.testing.assert_array_equal(in_window(mask, 3), [0, 1, 1, 0, 1, 0])
    np.testing.assert_array_equal(in_window(mask, 0), [0] * 6)
    np.testing.assert_array_equal(in_window(mask, None), mask)


@pytest.fixture(scope="module")
def vines(world, prompts):
    return jax.jit(lambda key: sample_vines(world, key, prompts, vines=2, size=3))(jax.random.key(8))


def test_vines_go_on_from_states_of_a_response(vines, world):
    assert vines.tokens.shape == (B, 7, T)
    attended, mask, role, tokens = (np.asarray(x) for x in (vines.attended, vines.mask, vines.role, vines.tokens))
    length = attended[:, 0].sum(-1)
    np.testing.assert_array_equal(mask[:, 0], attended[:, 0])
    for row, vine in enumerate([1, 1, 1, 2, 2, 2], start=1):
        place = (vine * length // 3)[:, None]
        shared = np.arange(T) < place
        np.testing.assert_array_equal(role[:, row] == PREFIX, shared)
        np.testing.assert_array_equal(tokens[:, row][shared], tokens[:, 0][shared])
        np.testing.assert_array_equal(mask[:, row], attended[:, row] & ~shared)
        assert mask[:, row].any(-1).all() and (np.asarray(vines.segment)[:, row] == vine).all()
    assert (length >= 3).any() and (tokens[:, 1] != tokens[:, 2]).any()
    scores = jax.jit(lambda x: world.score("policy", x))(vines)
    np.testing.assert_allclose(np.where(mask, scores.logp, 0), np.where(mask, vines.logp, 0), atol=1e-5)


def test_sets_decide_in_the_window_after_a_vine_state_and_gae_elsewhere():
    """One vine of two rows and one set of both: its objective is the baseline. Two sets of one: rewards 1 and 0."""
    logp = np.zeros((1, 3, 4))
    segment = np.broadcast_to(np.array([[0], [1], [1]], np.int32), logp.shape)
    batch = toy_batch(logp=logp, value=np.full((1, 3, 4), 0.5), outcome=[[1.0, 1, 0]])
    batch = with_rollouts(batch, segment=jnp.asarray(segment))
    options = {"vines": 1, "gamma": 1.0, "lam": 0.95, "alike": same_tokens, "window": 3}
    plain = compiled(gae)(batch)[0]
    both, _ = compiled(set_advantage, sets=1, members=2, **options)((), jax.random.key(0), batch)
    np.testing.assert_allclose(both[0, 0], plain[0])
    np.testing.assert_allclose(both[0, 1:], np.where(np.arange(4) < 3, 0, plain[1:]), atol=1e-6)
    seen, program = set(), compiled(set_advantage, sets=2, members=1, **options)
    for i in range(6):
        alone, _ = program((), jax.random.key(i), batch)
        assert (np.asarray(alone[0, 1:, :3]) == np.asarray(alone[0, 1:, :1])).all()
        seen.add(tuple(np.asarray(alone[0, 1:, 0]).tolist()))
    assert seen == {(0.5, -0.5), (0.0, 0.0)}  # different sets, or twice the same


def test_divergence_from_the_old_policy():
    old, new = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    got = jax.jit(from_old)(new, np.array(0), np.zeros(2), old=old)
    np.testing.assert_allclose(got, 0.5 * np.log(2) - 0.25 * np.log(2), rtol=1e-6)
    scores, batch = toy_rows()
    scores = dataclasses.replace(scores, extras={"from_old": jnp.asarray(np.array([[[1.0, 2, 3], [4, 5, np.nan]]]))})
    np.testing.assert_allclose(
        compiled(kl_from_old, weight=0.1)(scores, batch)[0], [[0.1, 0.2, 0.3], [0.4, 0.5, 0]], rtol=1e-6
    )


def test_polychromic_is_ppo():
    scores, batch = random_batch(jax.random.key(6))
    parent = dataclasses.replace(load("ppo", entropy=0.01), advantage=gae)
    same(load("polychromic", window=0, kl=None), parent, scores, batch)
    three = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, segment=batch.rollouts.version))
    child = partial(load, "polychromic", kl=None, vines=1, size=3, sets=2, members=2)
    same(child(window=0), parent, scores, three)
    with pytest.raises(AssertionError):
        same(child(window=2), parent, scores, three)


def test_polychromic_refuses_sets_larger_than_a_vine():
    with pytest.raises(ValueError, match="sets need 1 to 8 members and there must be one, got 9 and 4"):
        load("polychromic", members=9)
