"""How much the responses to a prompt differ."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def distinct_ngrams(tokens: Array, mask: Array, *, n: int) -> Array:
    """How many of a group's n-grams are different, as a share of all of them, `[]`; 0 if there are none.

    Args:
      tokens: `[G T]`.
      mask: `[G T]` bool; an n-gram counts if all of its tokens do.
      n: how long they are.
    """
    places = max(tokens.shape[-1] - n + 1, 0)
    whole = jnp.stack([mask[:, i : i + places].ravel() for i in range(n)]).all(0)
    parts = [tokens[:, i : i + places].ravel() for i in range(n)]
    ordered = jnp.stack(jax.lax.sort([~whole, *parts], num_keys=n + 1)[1:])
    new = jnp.pad((ordered[:, 1:] != ordered[:, :-1]).any(0), (1, 0), constant_values=True)[: whole.size]
    count = whole.sum()
    return (new & (jnp.arange(whole.size) < count)).sum() / jnp.maximum(count, 1)
