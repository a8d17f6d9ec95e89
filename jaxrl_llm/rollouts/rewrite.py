"""Prompts that the policy words anew, by how hard they are, and responses to both versions (CLPO, 2509.25004)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.contexts import extend, widen
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Context, Prompts, Rollouts, World, split

EASY, MEDIUM, HARD = range(3)
Piece = tuple[Array, Array]


def difficulty(outcome: Array, scored: Array, *, hard: float | Array, medium: float | Array) -> Array:
    """`[B]` int32: HARD up to a share `hard` of right responses, MEDIUM up to `medium`, else EASY; `[B G]` given.

    Prompts none of whose responses could be scored are EASY: nothing is known of them.
    """
    accuracy = masked_mean((outcome > 0.5).astype(jnp.float32), scored, axis=-1)
    level = jnp.where(accuracy <= hard, HARD, jnp.where(accuracy <= medium, MEDIUM, EASY))
    return jnp.where(scored.any(-1), level, EASY)


def rewritten(
    world: World,
    key: Array,
    prompts: Prompts,
    *,
    wanted: Array,
    instruction: Piece,
    answer: Piece,
    frame: tuple[tuple[int, ...], tuple[int, ...]],
    length: int,
    temperature: float | Array,
) -> tuple[Context, Array, Array]:
    """Each prompt in other words, `[B S']`, which are there `[B]`, and the tokens sampled for each `[B]`.

    Args:
      world: samples.
      key: consumed.
      prompts: `[B]`.
      wanted: `[B]` bool.
      instruction: `[B L]`, read after the prompt and its answer.
      answer: `[B 1 L]` or `[B L]`, of the prompt.
      frame: token ids before and after the words, as a template has them.
      length: the most tokens; a rewrite that does not end by itself counts.
      temperature: they are sampled with.
    """
    told = answer[0].reshape(*wanted.shape, -1), answer[1].reshape(*wanted.shape, -1)
    asked = jax.tree.map(lambda x: x[:, None], extend(prompts.context, told, instruction))
    sampling = dataclasses.replace(world.sampling, temperature=temperature)
    limit = jnp.where(wanted, length, 0)[:, None]
    drafts = world.sample(key, prompts, 1, context=asked, sampling=sampling, length=length, limit=limit)
    tokens, mask = drafts.tokens[:, 0], drafts.mask[:, 0]
    ended = ~drafts.truncated  # by a token that is no part of the text
    mask = mask & (jnp.arange(length) < mask.sum(-1, keepdims=True) - ended)
    before, after = (
        (jnp.broadcast_to(jnp.array(x, jnp.int32), (*wanted.shape, len(x))), jnp.ones((*wanted.shape, len(x)), bool))
        for x in frame
    )
    words = extend(Context(tokens=before[0], mask=before[1]), (tokens, mask), after)
    return words, wanted & mask.any(-1), drafts.mask.sum((1, 2))


def sample_and_rewrite(
    world: World,
    key: Array,
    prompts: Prompts,
    *,
    size: int,
    difficulty: Callable[[Array, Array], Array],
    levels: tuple[int, ...],
    instruction: Callable[[Array], Piece],
    answer: Callable[[Prompts], Piece],
    rewrite: Callable[..., tuple[Context, Array, Array]],
) -> Rollouts:
    """Groups of `size` for the prompts, and then, in as many groups again, for their rewritten versions.

    Groups of prompts that were not rewritten have no token. `segment` is the difficulty of the prompt as it was.

    Args:
      world: samples and verifies.
      key: consumed.
      prompts: `[B]`.
      size: G.
      difficulty: `(outcome [B G], scored) -> [B]`.
      levels: those that are rewritten.
      instruction: `(difficulty [B]) -> tokens and mask [B L]`.
      answer: `(prompts) -> tokens and mask [B 1 L]`.
      rewrite: `rewritten`, with its options.
    """
    keys = split(key, "first", "rewrite", "second")
    first = world.sample(keys["first"], prompts, size)
    first = dataclasses.replace(first, outcome=(outcome := world.reward(first)))
    level = difficulty(outcome, first.mask.any(-1) & ~jnp.isnan(outcome))
    wanted = (level[:, None] == jnp.array(levels)).any(-1)
    words = {"instruction": instruction(level), "answer": answer(prompts)}
    context, there, spent = rewrite(world, keys["rewrite"], prompts, wanted=wanted, **words)
    width = max(context.tokens.shape[-1], prompts.context.tokens.shape[-1])
    context, plain = widen(context, width), widen(prompts.context, width)
    context = jax.tree.map(lambda a, b: jnp.where(there[:, None], a, b)[:, None], context, plain)
    limit = jnp.broadcast_to(jnp.where(there, world.length, 0)[:, None], outcome.shape)
    second = world.sample(keys["second"], prompts, size, context=context, limit=limit)
    second = dataclasses.replace(second, outcome=world.reward(second))
    first = dataclasses.replace(first, context=widen(first.context, width))
    both: Rollouts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)
    sampled = both.mask.sum((1, 2)) + jnp.concatenate([spent, jnp.zeros_like(spent)])
    segment = jnp.broadcast_to(jnp.tile(level, 2)[:, None, None], both.tokens.shape)
    return dataclasses.replace(both, segment=segment, generated=sampled.astype(jnp.float32))
