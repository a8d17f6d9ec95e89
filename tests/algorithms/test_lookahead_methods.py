"""LATR: a group forks where the policy is unsure, looks ahead, and drops the branches that come to the same."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.algorithms import load
from jaxrl_llm.algorithms.latr import COUNTDOWN
from jaxrl_llm.models.model import Model
from jaxrl_llm.policy import language_model
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.lookahead import (
    Branches,
    Lookahead,
    common_subsequence,
    edit_distance,
    enough,
    few_edits,
    forked,
    look_ahead,
    overlapping,
    pruned,
    repeated_suffix,
    rooted,
    sample_lookahead,
    stepwise,
)
from jaxrl_llm.testing import evaluate, prepare, random_batch, toy_world
from jaxrl_llm.types import Decoding

B, G, T, VOCAB = 2, 6, 10, 12


def numbers(text):
    return jnp.array([ord(x) for x in text])


# --- how alike two texts are ------------------------------------------------------------------------------------------

KITTEN = numbers("kitten??"), numbers("sittin!!")  # two substitutions in six letters


def test_edit_distance_by_hand():
    assert edit_distance(*KITTEN, 6) == 2
    assert edit_distance(*KITTEN, 1) == 1  # k, s
    assert edit_distance(*KITTEN, 4) == 1
    assert edit_distance(numbers("abcdef"), numbers("bcdefa"), 6) == 2  # one deletion, one insertion, not six
    assert edit_distance(numbers("abcdef"), numbers("abcdef"), 6) == 0
    assert edit_distance(numbers("abc"), numbers("xyz"), 3) == 3


def test_common_subsequence_by_hand():
    assert common_subsequence(numbers("abcbdab?"), numbers("bdcaba!?"), 6) == 4  # bcba
    assert common_subsequence(numbers("aggtab"), numbers("gxtxay"), 6) == 3  # gta
    assert common_subsequence(numbers("abcdef"), numbers("bcdefa"), 6) == 5


def test_repeated_suffix_by_hand():
    assert repeated_suffix(numbers("xxabc"), numbers("abcyy"), 5) == 3  # abc, at the start of the other
    assert repeated_suffix(numbers("abcyy"), numbers("xxabc"), 5) == 3  # either way round
    assert repeated_suffix(numbers("abcxx"), numbers("abcyy"), 5) == 0
    assert repeated_suffix(numbers("abcxx"), numbers("abcyy"), 3) == 3
    assert repeated_suffix(numbers("abcab"), numbers("zzzzb"), 5) == 1


def by_definition(a, b):
    """The edit distance, the longest common subsequence and the longest repeated suffix, as recursions."""
    edit, common = np.zeros((len(a) + 1, len(b) + 1), int), np.zeros((len(a) + 1, len(b) + 1), int)
    for i, j in product(range(len(a) + 1), range(len(b) + 1)):
        if i == 0 or j == 0:
            edit[i, j] = i + j
            continue
        same = a[i - 1] == b[j - 1]
        edit[i, j] = min(edit[i - 1, j] + 1, edit[i, j - 1] + 1, edit[i - 1, j - 1] + (not same))
        common[i, j] = common[i - 1, j - 1] + 1 if same else max(common[i - 1, j], common[i, j - 1])
    x, y = ("".join(map(chr, s)) for s in (a, b))
    suffix = max(n for n in range(len(a) + 1) if x[len(a) - n :] in y or y[len(b) - n :] in x)
    return edit[-1, -1], common[-1, -1], suffix


def test_random_texts_are_as_alike_as_the_definitions_say():
    texts = np.asarray(jax.random.randint(jax.random.key(0), (40, 2, 7), 97, 100))
    lengths = np.arange(40) % 7 + 1
    got = [jax.vmap(f)(texts[:, 0], texts[:, 1], lengths) for f in (edit_distance, common_subsequence, repeated_suffix)]
    want = [by_definition(*(x[:n] for x in pair)) for pair, n in zip(texts, lengths, strict=True)]
    np.testing.assert_array_equal(np.stack(got, -1), want)


def test_thresholds_are_strict():
    """Two edits of five tokens are 0.4, which is not below 0.4."""
    a, b = numbers("abcde"), numbers("xbcdy")
    assert not few_edits(a, b, 5, below=0.4) and few_edits(a, b, 5, below=0.41)
    assert not overlapping(a, b, 5, suffix=0.2, rouge=0.6) and overlapping(a, b, 5, suffix=0.2, rouge=0.59)
    a, b = numbers("abcde"), numbers("xexyz")  # the suffix e stands in the other: 1 of 5
    assert not overlapping(a, b, 5, suffix=0.2, rouge=0.5) and overlapping(a, b, 5, suffix=0.19, rouge=0.5)


# --- one group --------------------------------------------------------------------------------------------------------


def group(*rows):
    """Branches of `(parent, birth, rank)` in their places; None for nobody."""
    parent = [0 if row is None else row[0] for row in rows]
    serial = [-1 if row is None else len(rows) * row[1] + row[2] for row in rows]
    return Branches(parent=jnp.array(parent), serial=jnp.array(serial))


FIRST = (0, 0, 0)


def test_forks_by_hand():
    """A second token above the one threshold and within the other of the first; both are strict."""
    rows = group(FIRST, (0, 1, 1), (0, 2, 1), (0, 3, 1), None, None, None, None)
    first = jnp.array([0.5, 0.45, 0.375, 0.4, 0.4, 0.4, 0.4, 0.4])
    second = jnp.array([0.25, 0.27, 0.25, 0.3, 0.4, 0.4, 0.4, 0.4])
    alive = jnp.ones(8, bool).at[3].set(False)
    fork = partial(forked, rows, t=5, capacity=8)
    # Row 0: not above 0.25; row 1: 0.18 apart; row 2: not above 0.25; row 3 has ended; the others are nobody.
    grown, new = fork(first, second, alive, absolute=0.25, relative=0.15)
    assert not new.any()
    np.testing.assert_array_equal(grown.serial, rows.serial)
    # Row 0: 0.25 apart, which is not below 0.25; row 2: 0.125 apart.
    grown, new = fork(first, second, alive, absolute=0.2, relative=0.25)
    np.testing.assert_array_equal(jnp.flatnonzero(new), [4, 5])
    np.testing.assert_array_equal(grown.parent[4:6], [1, 2])
    np.testing.assert_array_equal(grown.birth[4:6], [5, 5])
    assert grown.serial[4] < grown.serial[5] < 8 * 6


def test_the_oldest_rows_fork_first_and_the_capacity_holds():
    """Place 1 was taken again after place 2, so that its row is younger."""
    rows = group(FIRST, (0, 4, 1), (0, 2, 1), None, None, None)
    grown, new = forked(rows, *[jnp.full(6, 0.4)] * 2, jnp.ones(6, bool), 5, capacity=5, absolute=0.25, relative=0.15)
    np.testing.assert_array_equal(jnp.flatnonzero(new), [3, 4])
    np.testing.assert_array_equal(grown.parent[3:5], [0, 2])
    assert not grown.here[5] and grown.here.sum() == 5


def test_a_branch_is_dropped_with_what_grew_on_it():
    """At t=6 the branches of age 3 in places 1 and 2 are compared: 1 with row 0, 2 with 1. Place 3 left 1 later."""
    tokens = jnp.array([[9, 9, 9, 1, 2, 3, 0], [9, 9, 9, 4, 2, 3, 0], [9, 9, 9, 5, 6, 7, 0], [9, 9, 9, 4, 2, 8, 0]])
    rows, alive = group(FIRST, (0, 3, 1), (1, 3, 2), (1, 5, 1)), jnp.ones(4, bool)
    prune = partial(pruned, rows, tokens, t=6, windows=(2, 3))
    alike = partial(few_edits, below=0.4)  # row 1: 1 edit of 3; row 2: 3 of 3
    np.testing.assert_array_equal(prune(alive, alike=alike), [False, True, True, True])
    np.testing.assert_array_equal(prune(alive, alike=partial(few_edits, below=0.3)), [False] * 4)
    # Not at another age, and not if one of the two has ended.
    assert not pruned(rows, tokens, alive, 6, windows=(2, 4), alike=alike).any()
    for ended in (0, 1):
        assert not prune(alive.at[ended].set(False), alike=alike).any()
    # Row 3 has age 1.
    np.testing.assert_array_equal(
        pruned(rows, tokens, alive, 6, windows=(1,), alike=lambda a, b, n: a[0] == 8), [False] * 3 + [True]
    )


@pytest.mark.parametrize("fill", [-1, 10**9])
def test_tokens_that_are_not_there_do_not_count(fill):
    tokens = jnp.array([[9, 1, 2, fill], [9, 3, 2, -fill]])
    rows, alike = group(FIRST, (0, 1, 1)), partial(few_edits, below=0.51)
    assert pruned(rows, tokens, jnp.ones(2, bool), 3, windows=(2, 50), alike=alike)[1]


def test_when_the_groups_are_full_by_hand():
    """Two groups of 4: 7 rows of 8 are wanted at 0.9, as 7.2 is rounded; the youngest branch was born at 3."""
    full, some = group(FIRST, (0, 1, 1), (0, 2, 1), (1, 3, 1)), group(FIRST, (0, 1, 1), None, (0, 2, 1))
    rows = jax.tree.map(lambda *x: jnp.stack(x), full, some)
    alive = jnp.ones((2, 4), bool)
    done = partial(enough, capacity=4, length=100, longest=5, full=0.9, decay=0.0)
    assert not done(rows, alive, 9)  # it is compared at 8, and 3 + 5 >= 9 - 1
    assert done(rows, alive, 10)
    assert not partial(done, full=0.98)(rows, alive, 10)  # 7.84: 8 are wanted
    assert partial(done, full=0.98, decay=0.5)(rows, alive, 51)  # 0.98 - 0.25: 5.84
    assert partial(done, full=0.98)(rows, alive.at[1].set(False), 10)  # ended rows need no company
    assert not partial(done, full=0.98)(rows, alive.at[1, 0].set(False), 10)


def test_the_share_is_that_of_the_last_step_named():
    got = [float(COUNTDOWN(jnp.array(i))) for i in (0, 9, 10, 19, 20, 79, 80, 199, 200, 1000)]
    assert got == [1, 1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0, 0]
    assert stepwise(jnp.array(0), at=(5, 9), values=(0.5, 0.25)) == 0.5


# --- whole rollouts ---------------------------------------------------------------------------------------------------


def markov() -> Model:
    """The next token depends on the last one alone, and its logits are the parameters `[V V]`."""

    def decode(params, prefix, mask, cache, offset, inputs, t, column=None):
        return jax.nn.one_hot(inputs, VOCAB), cache

    return Model(
        vocab=VOCAB,
        width=VOCAB,
        init=lambda key: jax.random.normal(key, (VOCAB, VOCAB)),
        hidden=lambda params, prefix, offset, inputs, attended: jax.nn.one_hot(inputs, VOCAB),
        logits=lambda params, hidden: hidden @ params,
        prefill=lambda params, prefix: jnp.zeros((prefix.tokens.shape[0], 1)),
        decoder=lambda params: params,
        empty=lambda m, r, t: jnp.zeros((m, r, 1)),
        decode=decode,
    )


class Tokenizer:
    eos_token_id, pad_token_id = 0, VOCAB


@pytest.fixture(scope="module")
def prompts(letters):
    prompts = letters.draw(jax.random.key(4), B)
    context = jax.tree.map(lambda x: x[:, :3], prompts.context)
    tokens = jnp.array([[1, 2, 3], [4, 5, 6]])
    return type(prompts)(
        context=type(context)(tokens=tokens, mask=jnp.ones((B, 3), bool)), index=prompts.index, target=prompts.target
    )


def world_of(params, letters):
    task = dataclasses.replace(letters, tokenizer=Tokenizer(), stop=())
    return toy_world(language_model(markov()), task, params, length=T)


GROW = {
    "size": G,
    "share": partial(stepwise, at=(0,), values=(1.0,)),
    "absolute": 0.25,
    "relative": 0.15,
    "windows": (2, 3),
    "alike": partial(few_edits, below=0.4),
    "force": 8,
    "full": 0.98,
    "decay": 0.05,
}


def grow(params, letters, prompts, *, seed=0, **changed):
    world = world_of(params, letters)
    return jax.jit(lambda key: sample_lookahead(world, key, prompts, **(GROW | changed)))(jax.random.key(seed))


# After each token: the most probable one, and the next. Some branches meet again, also after they forked themselves.
FIRSTS = [8, 11, 8, 10, 11, 3, 11, 11, 8, 5, 10, 11]
SECONDS = [7, 3, 1, 4, 3, 11, 7, 2, 6, 6, 9, 4]


@pytest.fixture(scope="module")
def unsure():
    """Two tokens are probable after each one, 0.51 and 0.46; the end token never comes."""
    rows = jnp.arange(VOCAB)
    after = jnp.zeros((VOCAB, VOCAB)).at[rows, jnp.array(FIRSTS)].set(6.0).at[rows, jnp.array(SECONDS)].set(5.9)
    return after.at[:, 0].set(-30.0)


def test_without_branches_it_is_one_greedy_beginning_that_is_copied_and_then_sampled(unsure, letters, prompts):
    flat = 0.3 * unsure  # so that what is sampled differs
    got = grow(flat, letters, prompts, absolute=1.0)
    assert got.mask.all()
    best, now = [], prompts.context.tokens[:, -1]
    for _ in range(8):
        now = jnp.argmax(flat[now], -1)
        best.append(now)
    np.testing.assert_array_equal(got.tokens[..., :8], np.broadcast_to(np.stack(best, -1)[:, None], (B, G, 8)))
    assert all(len({tuple(row) for row in np.asarray(group)[:, 8:].tolist()}) > 2 for group in got.tokens)


def test_what_is_recorded_is_what_the_policy_makes_of_the_tokens(unsure, letters, prompts):
    got = grow(unsure, letters, prompts)
    inputs = jnp.concatenate(
        [jnp.broadcast_to(prompts.context.tokens[:, -1:, None], (B, G, 1)), got.tokens[..., :-1]], -1
    )
    want = jnp.take_along_axis(jax.nn.log_softmax(unsure[inputs], -1), got.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(got.logp, want, atol=1e-5)


def distance(a, b):
    return by_definition(list(a), list(b))[0]


@pytest.mark.parametrize("capacity", [1.0, 0.5])
def test_a_whole_run_by_the_rule_in_python(unsure, letters, prompts, capacity):
    """The groups up to the step after which they are sampled, by lists that grow and shrink as in the released code."""
    below, windows, force, places = 0.51, (2, 3), 8, round(G * capacity)
    share = partial(stepwise, at=(0,), values=(capacity,))
    alike = partial(few_edits, below=below)
    got = grow(unsure, letters, prompts, share=share, alike=alike, full=2.0)  # it never stops before it must
    p = np.asarray(jax.nn.softmax(unsure, -1))
    dropped = 0
    for b in range(B):
        rows = [{"text": [int(prompts.context.tokens[b, -1])], "parent": None, "birth": 0}]
        for step in range(force):
            born = []
            for row in rows:
                first, second = np.argsort(-p[row["text"][-1]], kind="stable")[:2]
                now = p[row["text"][-1]]
                if now[second] > 0.25 and now[first] - now[second] < 0.15 and len(rows) + len(born) < places:
                    born.append({"text": [*row["text"], int(second)], "parent": row, "birth": step})
                row["next"] = int(first)
            for row in rows:
                row["text"].append(row["next"])
            rows += born
            gone = []
            for row in rows:
                age = step + 1 - row["birth"]
                parent = row["parent"]
                if parent and age in windows and distance(row["text"][-age:], parent["text"][-age:]) / age < below:
                    gone.append(row)
            if step + 1 < force:
                dropped += len(gone)
            for _ in range(G):
                gone += [row for row in rows if any(row["parent"] is x for x in gone)]
            rows = [row for row in rows if not any(row is x for x in gone)]
        want = [row["text"][1:] for row in rows]
        want += [rows[0]["text"][1:]] * (places - len(want))
        assert sorted(np.asarray(got.tokens[b, :places, :force]).tolist()) == sorted(want)
        assert got.tokens[b, 0, :force].tolist() == rows[0]["text"][1:]
    assert dropped > 0


def test_branches_that_come_to_the_same_are_dropped_and_without_dropping_they_are_not(letters, prompts):
    """After one token of their own all branches are in the state of the row they left, but for what came before."""
    rows = jnp.arange(VOCAB)
    same = jnp.zeros((VOCAB, VOCAB)).at[:, 0].set(-30.0).at[1:, 1].set(6.0).at[rows, 2].set(5.9)
    kept = grow(same, letters, prompts, alike=lambda a, b, n: False)
    assert all(len({tuple(x) for x in g}) > 3 for g in np.asarray(kept.tokens)[..., :7].tolist())
    few = grow(same, letters, prompts, alike=lambda a, b, n: True, windows=(1,))
    for g in np.asarray(few.tokens)[..., :7].tolist():
        assert {tuple(x) for x in g} == {(1,) * 7}


def test_an_ended_tree_is_filled_with_its_first_row(letters, prompts):
    """The end token comes second: the group is over before it is full."""
    ends = jnp.zeros((VOCAB, VOCAB)).at[:, 7].set(9.0).at[7].set(0).at[7, 0].set(9.0)
    got = grow(ends, letters, prompts)
    np.testing.assert_array_equal(got.tokens[..., :2], np.broadcast_to([7, 0], (B, G, 2)))
    np.testing.assert_array_equal(got.mask.sum(-1), np.full((B, G), 2))
    assert not got.truncated.any()


@pytest.mark.parametrize("changed", [{"share": partial(stepwise, at=(0,), values=(0.0,))}, {"force": 0}])
def test_no_share_and_no_force_is_a_group_of_samples(unsure, letters, prompts, changed):
    flat = 0.3 * unsure
    got = grow(flat, letters, prompts, **changed)
    want = sample_group(world_of(flat, letters), jax.random.key(0), prompts, size=G)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logp, want.logp, atol=1e-6)
    np.testing.assert_array_equal(got.mask, want.mask)


def test_rows_beyond_the_share_are_samples_as_ever(unsure, letters, prompts):
    """Half of six rows are grown: 3 (and of three, 1.5 is 2)."""
    flat = 0.3 * unsure
    got = grow(flat, letters, prompts, share=partial(stepwise, at=(0,), values=(0.5,)), absolute=1.0)
    want = sample_group(world_of(flat, letters), jax.random.key(0), prompts, size=G)
    np.testing.assert_array_equal(got.tokens[:, 3:], want.tokens[:, 3:])
    assert (got.tokens[:, :3, :8] == got.tokens[:, :1, :8]).all()


def test_thresholds_act_on_the_distribution_at_temperature_one():
    """At the first step: probabilities 0.4 and 0.3, whatever the rows are sampled with."""
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1]))
    shape = (1, 3)
    seen = Decoding(
        t=jnp.array(0),
        logits=jnp.broadcast_to(logits, (1, 3, 4)),
        tokens=jnp.zeros((1, 3, 5), int),
        mask=jnp.zeros((1, 3, 5), bool),
        alive=jnp.ones(shape, bool),
    )
    start = rooted(shape, capacity=jnp.array(3))
    rule = {k: v for k, v in GROW.items() if k not in ("size", "share")} | {"capacity": jnp.array(3)}
    memory, source, token = look_ahead(start, seen, **rule)
    assert isinstance(memory, Lookahead) and not memory.over
    np.testing.assert_array_equal(source, [[0, 0, -1]])
    np.testing.assert_array_equal(token[:, :2], [[0, 1]])
    _, source, _ = look_ahead(start, seen, **(rule | {"relative": 0.09}))
    np.testing.assert_array_equal(source, [[0, -1, -1]])


def test_the_loss_is_that_of_grpo():
    """In value and gradient; what differs are the rows."""
    scores, batch = random_batch(jax.random.key(1))
    found = []
    for recipe in (load("latr", kl=0.04), load("grpo")):
        got = evaluate(recipe.loss, scores, prepare(recipe, batch))
        found.append((got.value, got.coefficient))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-6)
    assert (found[0][1] != 0).any()


@pytest.mark.parametrize("wrong", [{"windows": ()}, {"windows": (0, 3)}, {"force": -1}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="latr: windows"):
        load("latr", **wrong)
