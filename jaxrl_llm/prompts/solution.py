"""The solution that came with a prompt, as a piece of a context."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Prompts


def solution(prompts: Prompts) -> tuple[Array, Array]:
    """Tokens and mask `[B 1 L]` of each prompt's logged response with the highest reward, the first of equals.

    Raises:
      ValueError: the prompts carry no responses.
    """
    logged = prompts.logged
    if logged is None:
        raise ValueError("a context with the solution needs prompts.logged, and this data carries no responses")
    best = jnp.where(logged.mask.any(-1), logged.reward, -jnp.inf).argmax(-1)[:, None, None]
    return jnp.take_along_axis(logged.tokens, best, axis=1), jnp.take_along_axis(logged.mask, best, axis=1)


def words(ids: tuple[int, ...]) -> tuple[Array, Array]:
    """Tokens and mask `[L]` of the same text for every row."""
    return jnp.array(ids, jnp.int32), jnp.ones(len(ids), bool)
