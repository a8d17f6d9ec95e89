"""Numbers that responses say."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Read = Callable[[Array, Array], tuple[Array, Array]]  # (tokens [T], mask [T]) -> (numbers [n], whether they are there)


def last_numbers(tokens: Array, mask: Array, *, count: int, zero: int, point: int) -> tuple[Array, Array]:
    """The last `count` numbers of a response, `[count]`, and whether there are as many, `[]` bool.

    Args:
      tokens: `[T]`.
      mask: `[T]` bool; other tokens end a number.
      count: how many.
      zero: the id of the digit 0; those of the others follow it.
      point: the id of the decimal point. There are no signs.
    """

    def step(state: tuple[Array, ...], token: Array) -> tuple[tuple[Array, ...], None]:
        value, scale, inside, last, seen = state
        digit = (token >= zero) & (token <= zero + 9)
        dot = inside & (token == point) & (scale == 1)
        ends = inside & ~digit & ~dot
        last = jnp.where(ends, jnp.roll(last, -1).at[-1].set(value), last)
        longer = jnp.where(scale == 1, jnp.minimum(10 * value, 1e9) + token - zero, value + scale * (token - zero))
        value = jnp.where(digit, longer, jnp.where(ends, 0.0, value))
        scale = jnp.where(dot | (digit & (scale < 1)), scale / 10, jnp.where(ends, 1.0, scale))
        return (value, scale, digit | dot, last, seen + ends), None

    # After the point, `scale` is what the next digit is worth.
    start: tuple[Array, ...] = (
        jnp.zeros(()),
        jnp.ones(()),
        jnp.zeros((), bool),
        jnp.zeros(count),
        jnp.zeros((), jnp.int32),
    )
    text = jnp.append(jnp.where(mask, tokens, -1), -1)
    (_, _, _, last, seen), _ = jax.lax.scan(step, start, text)
    return last, seen >= count
