"""New prompts made of verified responses: judge an answer, compare two, correct a wrong one (SPARK, 2509.22624)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.contexts import extend, widen
from jaxrl_llm.types import Batch, Context, Prompts, PyTree, record, split

Answer = Callable[[Array, Array], Array]


class Words(NamedTuple):
    """Token ids of the text around questions and answers, and of what a judge may say."""

    right: tuple[int, ...]
    wrong: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    judge: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # before and after the answer
    compare: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] = ((), (), ())  # around and between two answers
    reflect: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())  # before and after the response


@record
class Tasks:
    """Prompts whose answers need no model to be checked, `[N]`."""

    context: Context  # [N S]
    label: Array  # [N L] int32: what a judge is to say
    size: Array  # [N] int32: tokens of the label; 0 where the verifier of the question decides
    index: Array  # [N] int32, of the question
    target: PyTree  # leading axis N, of the question
    there: Array  # [N] bool


def after(tokens: Array, mask: Array, *, marker: tuple[int, ...] = ()) -> Array:
    """`[... T]` bool: the real tokens after the last `marker`; nothing without one, everything if it is empty."""
    if not marker:
        return mask
    width, length = len(marker), tokens.shape[-1]
    windows = jnp.arange(length - width + 1)[:, None] + jnp.arange(width)
    found = ((tokens[..., windows] == jnp.array(marker)) & mask[..., windows]).all(-1)
    last = jnp.where(found, jnp.arange(found.shape[-1]), -length - width).max(-1, initial=-length - width)
    return mask & (last[..., None] >= 0) & (jnp.arange(length) >= last[..., None] + width)


def says(tokens: Array, mask: Array, label: Array, size: Array) -> Array:
    """`[...]` bool: whether an answer (`mask` of `tokens`, `[... T]`) is the label, or the label and one token more.

    That token is the end of the response. `label [... L]` holds `size [...]` tokens.
    """
    order = jnp.argsort(~mask, axis=-1, stable=True)
    length, width = mask.sum(-1), min(label.shape[-1], tokens.shape[-1])
    same = jnp.take_along_axis(tokens, order, axis=-1)[..., :width] == label[..., :width]
    same = (same | (jnp.arange(width) >= size[..., None])).all(-1)
    return same & (length >= size) & (length <= size + 1)


def tasks_of(
    batch: Batch,
    key: Array,
    *,
    words: Words,
    answer: Answer,
    pointwise: float | Array,
    most: int,
    threshold: float | Array = 0.5,
) -> Tasks:
    """At most `most` judgements, then at most as many reflections, each a random choice among those of the groups.

    Args:
      batch: verified.
      key: consumed.
      words: of the prompts.
      answer: `(tokens [... T], mask) -> [... T]` bool, a response's final answer: all a judge sees of it.
      pointwise: how often a group with right and wrong rows gives a single answer to judge, not two to compare.
      most: of either kind.
      threshold: right means an outcome above it.
    """
    keys, tokens, groups = split(key, "judge", "reflect", "judged", "reflected"), batch.rollouts.tokens, len(batch.mask)
    right = batch.rows & (batch.outcome > threshold)
    group = batch.prompts.context, tokens, batch.mask, answer(tokens, batch.mask), right, batch.rows & ~right
    judge = jax.vmap(functools.partial(judgement, words=words, pointwise=pointwise))
    reflect = jax.vmap(functools.partial(reflection, words=words))
    judged = judge(jax.random.split(keys["judge"], groups), *group)
    full = jnp.arange(groups) < (groups + 1) // 2
    reflected = reflect(jax.random.split(keys["reflect"], groups), full, *group)
    width = max(judged[0].tokens.shape[-1], reflected[0].tokens.shape[-1])
    kinds = [
        _chosen(keys[name], batch.prompts, widen(found[0], width), *found[1:], words=words, most=most)
        for name, found in (("judged", judged), ("reflected", reflected))
    ]
    both: Tasks = jax.tree.map(lambda *x: jnp.concatenate(x), *kinds)
    return both


def judgement(
    key: Array,
    context: Context,
    tokens: Array,
    mask: Array,
    answers: Array,
    right: Array,
    wrong: Array,
    *,
    words: Words,
    pointwise: float | Array,
) -> tuple[Context, Array, Array]:
    """Of one group (`tokens [G T]`, `right [G]`): the judge's prompt `[S]`, which label is true, whether there is one.

    Right and wrong rows: one of each to compare in random order, or one of either to judge. Only right ones: the first
    to judge. Only wrong ones: one with a final answer.
    """
    keys = split(key, "kind", "right", "wrong", "legible", "either", "order")
    good, bad, legible = _one(keys["right"], right), _one(keys["wrong"], wrong), wrong & answers.any(-1)
    mixed, swapped = right.any() & wrong.any(), jax.random.bernoulli(keys["order"])
    pair = mixed & (jax.random.uniform(keys["kind"]) >= pointwise)
    alone = jnp.where(right.any(), right.argmax(), _one(keys["legible"], legible))
    alone = jnp.where(mixed, jnp.where(jax.random.bernoulli(keys["either"]), good, bad), alone)
    one, two = jnp.where(pair, jnp.where(swapped, bad, good), alone), jnp.where(swapped, good, bad)
    prompt = extend(
        context,
        _words(words.judge[0], ~pair),
        _words(words.compare[0], pair),
        (tokens[one], answers[one]),
        _words(words.compare[1], pair),
        (tokens[two], answers[two] & pair),
        _words(words.judge[1], ~pair),
        _words(words.compare[2], pair),
    )
    label = jnp.where(pair, 2 + swapped, jnp.where(right[alone], 0, 1))
    return prompt, label, right.any() | mixed | legible.any()


def reflection(
    key: Array,
    full: Array,
    context: Context,
    tokens: Array,
    mask: Array,
    answers: Array,
    right: Array,
    wrong: Array,
    *,
    words: Words,
) -> tuple[Context, Array, Array]:
    """As `judgement`: the question again with a wrong response, or with its final answer alone where not `full`."""
    row = _one(key, wrong)
    seen = jnp.where(full, mask[row], answers[row])
    prompt = extend(context, _words(words.reflect[0], True), (tokens[row], seen), _words(words.reflect[1], True))
    return prompt, jnp.int32(4), wrong.any()


def _chosen(
    key: Array, prompts: Prompts, context: Context, label: Array, there: Array, *, words: Words, most: int
) -> Tasks:
    """At most `most` of those that are there."""
    said = (words.right, words.wrong, words.first, words.second, ())
    width = max(map(len, said))
    ids = jnp.array([(*x, *[0] * (width - len(x))) for x in said], jnp.int32)
    tasks = Tasks(
        context=context,
        label=ids[label],
        size=jnp.array([len(x) for x in said], jnp.int32)[label],
        index=prompts.index,
        target=prompts.target,
        there=there,
    )
    order = jnp.argsort(jnp.where(there, jax.random.uniform(key, there.shape), jnp.inf))
    chosen: Tasks = jax.tree.map(lambda x: x[order[:most]], tasks)
    return chosen


def _one(key: Array, among: Array) -> Array:
    return jnp.where(among, jax.random.uniform(key, among.shape), -1.0).argmax()


def _words(ids: tuple[int, ...], there: Array | bool) -> tuple[Array, Array]:
    return jnp.array(ids, jnp.int32), jnp.broadcast_to(there, len(ids))
