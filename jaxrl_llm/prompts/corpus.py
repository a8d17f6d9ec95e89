"""Questions that were solved, with a solution each: examples for those that were not (XRPO, 2510.06672)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.contexts import extend
from jaxrl_llm.stats import first
from jaxrl_llm.types import Batch, Context, Problem, Prompts

Corpus = dict[str, Any]  # context [N S], tokens and mask [N T], embedding [N D], index [N] (-1: free), next []
Embed = Callable[[Context], Array]


def token_counts(context: Context, *, width: int = 256) -> Array:
    """`[... width]`, of length 1: how often each token (its id modulo the width) is in a context."""
    one = jax.nn.one_hot(context.tokens % width, width) * context.mask[..., None]
    count = one.sum(-2)
    return count / jnp.maximum(jnp.linalg.norm(count, axis=-1, keepdims=True), 1e-6)


def empty_corpus(problem: Problem, *, places: int, embed: Embed) -> Corpus:
    """Nothing solved yet.

    Raises:
      ValueError: a step has more prompts than there are places.
    """
    if places < problem.prompts:
        raise ValueError(f"a corpus needs a place for each of the {problem.prompts} prompts of a step, got {places}")
    context = jax.tree.map(lambda x: jnp.zeros((places, *x.shape[1:]), x.dtype), problem.example.context)
    return {
        "context": context,
        "tokens": jnp.zeros((places, problem.length), jnp.int32),
        "mask": jnp.zeros((places, problem.length), bool),
        "embedding": jnp.zeros(jax.eval_shape(embed, context).shape),
        "index": jnp.full(places, -1, jnp.int32),
        "next": jnp.zeros((), jnp.int32),
    }


def with_solved(corpus: Corpus, batch: Batch, *, embed: Embed, threshold: float | Array = 0.5) -> Corpus:
    """With the first right response to every prompt that has none yet, in place of the oldest entries."""
    prompts, places = batch.prompts, corpus["index"].shape[0]
    right = batch.rows & (batch.outcome > threshold)
    new = right.any(-1) & ~(corpus["index"] == prompts.index[:, None]).any(-1)
    new &= first(prompts.index, among=new)
    place = jnp.where(new, (corpus["next"] + jnp.cumsum(new) - 1) % places, places)  # out of bounds is dropped
    row = right.argmax(-1)[:, None, None]
    entry = {
        "context": prompts.context,
        "tokens": jnp.take_along_axis(batch.rollouts.tokens, row, axis=1)[:, 0],
        "mask": jnp.take_along_axis(batch.rollouts.mask, row, axis=1)[:, 0],
        "embedding": embed(prompts.context),
        "index": prompts.index,
    }
    old = {name: corpus[name] for name in entry}
    written = jax.tree.map(lambda a, b: a.at[place].set(b, mode="drop"), old, entry)
    return {**written, "next": ((corpus["next"] + new.sum()) % places).astype(jnp.int32)}


def with_examples(
    corpus: Corpus, prompts: Prompts, where: Array, *, count: int, embed: Embed, between: tuple[int, ...] = ()
) -> Context:
    """`[B 1 S']`: the `count` solved questions most like each prompt, with their solutions, and then the prompt.

    Args:
      corpus: may hold fewer.
      prompts: `[B]`.
      where: `[B]` bool, prompts that get examples; the others stay as they are.
      count: 0 for none.
      embed: similarity is the inner product.
      between: token ids after each example.
    """
    likeness = jnp.where(corpus["index"] >= 0, embed(prompts.context) @ corpus["embedding"].T, -jnp.inf)
    values, rows = jax.lax.top_k(likeness, count)
    there = (where[:, None] & (values > -jnp.inf))[..., None]
    pieces = []
    for k in range(count):
        row, given = rows[:, k], there[:, k]
        pieces.append((corpus["context"].tokens[row], corpus["context"].mask[row] & given))
        pieces.append((corpus["tokens"][row], corpus["mask"][row] & given))
        pieces.append((jnp.array(between, jnp.int32), jnp.broadcast_to(given, (*given.shape[:1], len(between)))))
    pieces.append((prompts.context.tokens, prompts.context.mask))
    context = extend(Context(tokens=pieces[0][0], mask=pieces[0][1]), *pieces[1:])
    return Context(tokens=context.tokens[:, None], mask=context.mask[:, None])
