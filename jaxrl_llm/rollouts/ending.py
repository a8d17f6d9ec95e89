"""When a response ends, and when a batch of them has."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Context


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """What ends a response besides its length: any token of `eos`, or its last tokens being one of `stop`.

    Raises:
      ValueError: an empty stop sequence, or a token id below 0.
    """

    eos: tuple[int, ...] = ()
    stop: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if not all(self.stop):
            raise ValueError(f"stop: a stop sequence needs at least one token, got {self.stop}")
        if any(token < 0 for token in (*self.eos, *(token for sequence in self.stop for token in sequence))):
            raise ValueError(f"eos and stop hold token ids, which are at least 0; got eos={self.eos}, stop={self.stop}")

    def empty(self, shape: tuple[int, ...]) -> Array:
        """The memory of a response without tokens: as many last tokens as the longest stop sequence has."""
        return jnp.full((*shape, max(map(len, self.stop), default=0)), -1, jnp.int32)

    def after(self, context: Context, own: Array) -> Array:
        """The memory `[... L]` of responses that begin with the last `own` `[...]` tokens of a context `[... S]`."""
        back = jnp.arange(self.empty(()).shape[0])[::-1]
        place = context.mask.sum(-1)[..., None] - 1 - back
        tokens = jnp.take_along_axis(context.tokens, jnp.maximum(place, 0), axis=-1)
        return jnp.where(back < own[..., None], tokens, -1)

    def __call__(self, recent: Array, token: Array) -> tuple[Array, Array]:
        """`recent` `[... L]`, the new `token` `[...]` -> the new `recent`, whether the response ends `[...]` bool."""
        recent = jnp.concatenate([recent, token[..., None]], axis=-1)[..., 1:]
        end = jnp.zeros(token.shape, bool)
        for one in self.eos:
            end |= token == one
        for sequence in self.stop:
            end |= jnp.all(recent[..., -len(sequence) :] == jnp.asarray(sequence), axis=-1)
        return recent, end


def anywhere(x: Array) -> Array:
    """Whether any of `x` `[...]` is True; under `vmap`, in any member of the batch.

    As the condition of a loop it keeps one counter for all members: a condition of their own would turn the counter,
    and with it every write to a cache, into a batched one.
    """
    found: Array = _anywhere(x)
    return found


@jax.custom_batching.custom_vmap
def _anywhere(x: Array) -> Array:
    return jnp.any(x)


@_anywhere.def_vmap
def _anywhere_batched(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Any, bool]:
    return _anywhere(x), False
