"""Contexts made of other tokens: a prompt and what is to be read after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Context


def extend(context: Context, *pieces: tuple[Array, Array]) -> Context:
    """`context` followed by the real tokens of each piece, right-padded.

    Args:
      context: `[... S]`.
      pieces: `(tokens [... L], mask [... L])` each; leading axes broadcast with those of `context`.

    Returns:
      `[... S + sum of L]`.
    """
    parts = [(context.tokens, context.mask), *pieces]
    lead = jnp.broadcast_shapes(*(tokens.shape[:-1] for tokens, _ in parts))
    tokens, mask = (
        jnp.concatenate([jnp.broadcast_to(x[i], (*lead, x[i].shape[-1])) for x in parts], axis=-1) for i in (0, 1)
    )
    order = jnp.argsort(~mask, axis=-1, stable=True)
    tokens, mask = (jnp.take_along_axis(x, order, axis=-1) for x in (tokens, mask))
    return Context(tokens=jnp.where(mask, tokens, 0), mask=mask)


def widen(context: Context, width: int) -> Context:
    """The same contexts padded to `[... width]`."""
    gap = [(0, 0)] * (context.tokens.ndim - 1) + [(0, width - context.tokens.shape[-1])]
    wide: Context = jax.tree.map(lambda x: jnp.pad(x, gap), context)
    return wide
