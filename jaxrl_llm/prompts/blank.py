"""Contexts without some of their tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Context


def everywhere(context: Context) -> Array:
    """`[... S]` bool: every token of the context."""
    return context.mask


def blanked(
    key: Array,
    context: Context,
    *,
    share: float | Array,
    blank: int,
    where: Callable[[Context], Array] = everywhere,
) -> Context:
    """The context with a random `share` of its tokens `where`, rounded up, replaced by the token `blank`."""
    may = where(context) & context.mask
    noise = jnp.where(may, jax.random.uniform(key, may.shape), jnp.inf)
    rank = jnp.argsort(jnp.argsort(noise, axis=-1), axis=-1)
    chosen = may & (rank < share * may.sum(-1, keepdims=True))
    return dataclasses.replace(context, tokens=jnp.where(chosen, blank, context.tokens))
