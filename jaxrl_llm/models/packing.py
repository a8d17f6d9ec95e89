"""Responses without their padding: the tokens that a score needs, side by side.

Everything but attention goes token by token, so it may as well go over the tokens that exist. Attention sees rows: it
unpacks, attends and packs again. A program has one shape, so room comes in a few sizes (`rooms`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Rollouts


@dataclasses.dataclass(frozen=True)
class Room:
    """Static: places for `tokens` tokens in each of `shards` equal parts of the contexts."""

    tokens: int
    shards: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
    """Where tokens of `[M R T]` stand in `[shards, N]`, and back."""

    order: Array  # [shards N] int32: the place in a shard's M R T tokens; arbitrary where not valid
    valid: Array  # [shards N] bool
    slot: Array  # [shards, M R T / shards] int32: the place in N; arbitrary where not needed
    needed: Array  # [M R T] bool

    def pack(self, x: Array) -> Array:
        """`[M R T ...] -> [shards N ...]`, 0 where no token is."""
        return _pack(x, self)

    def unpack(self, y: Array) -> Array:
        """`[shards N ...] -> [M R T ...]`, 0 where not needed."""
        return _unpack(y, self)


def needed(exists: Array, scored: Array) -> Array:
    """`[... T]` bool: the inputs without which some scored token cannot be scored.

    Args:
      exists: `[... T]` bool, inputs that carry a token.
      scored: `[... T]` bool, outputs that are read.
    """
    later = jnp.flip(jax.lax.cummax(jnp.flip(scored, -1).astype(jnp.int8), axis=scored.ndim - 1), -1) > 0
    return (exists | scored) & later


def of_rollouts(rollouts: Rollouts) -> Array:
    """`needed` of a batch's rows, `[M R T]` with the `M` contexts of all prompts."""
    (b, g, t), contexts = rollouts.tokens.shape, rollouts.context.tokens.shape[1]
    # Input 0 is the context's last token, input t is token t - 1.
    exists = jnp.concatenate([jnp.ones((b, g, 1), bool), rollouts.attended[..., :-1]], axis=-1)
    return needed(exists, rollouts.scored).reshape(b * contexts, g // contexts, t)


def rooms(rollouts: Rollouts, sizes: int, shards: int = 1) -> tuple[tuple[Room | None, ...], Array]:
    """The rooms a program has code for, and which of them holds these rollouts.

    Args:
      rollouts: their tokens are counted.
      sizes: how many; they grow evenly, and the largest is the padded layout, `None`.
      shards: parts of the contexts that do not share room, because they live on different devices.
    """
    mask = of_rollouts(rollouts)
    shards = shards if mask.shape[0] % shards == 0 else 1
    total = mask.size // shards
    steps = [math.ceil(total * k / sizes) for k in range(1, sizes)]
    count = mask.reshape(shards, total).sum(-1).max()
    return (*(Room(n, shards) for n in steps), None), jnp.searchsorted(jnp.array(steps, jnp.int32), count)


def packing(mask: Array, room: Room) -> Packing:
    """Packs the tokens of `mask` `[M R T]`; those that find no room are lost, so count first (`rooms`)."""
    flat = mask.reshape(room.shards, -1)
    order = jnp.argsort(~flat, axis=-1, stable=True)[:, : room.tokens].astype(jnp.int32)
    places = order.shape[1]
    slot = jnp.clip(jnp.cumsum(flat, axis=-1, dtype=jnp.int32) - 1, 0, places - 1)
    valid = jnp.arange(places) < flat.sum(-1, keepdims=True)
    return Packing(order=order, valid=valid, slot=slot, needed=mask)


def _gather(x: Array, index: Array, mask: Array) -> Array:
    """`x[s, index[s, n]]`, 0 where not `mask`; `x` `[s, n, ...]`."""
    more = (1,) * (x.ndim - 2)
    found = jnp.take_along_axis(x, index.reshape(*index.shape, *more), axis=1, mode="clip")
    return jnp.where(mask.reshape(*mask.shape, *more), found, 0)


# The transpose of a gather is a scatter, unless one knows that it is the other gather.


@jax.custom_vjp
def _pack(x: Array, p: Packing) -> Array:
    shards = p.order.shape[0]
    return _gather(x.reshape(shards, -1, *x.shape[3:]), p.order, p.valid)


@jax.custom_vjp
def _unpack(y: Array, p: Packing) -> Array:
    found = _gather(y, p.slot, p.needed.reshape(p.slot.shape))
    return found.reshape(*p.needed.shape, *y.shape[2:])


def _keep(function: Any) -> Any:
    return lambda x, p: (function(x, p), p)


_pack.defvjp(_keep(_pack), lambda p, g: (_unpack(g, p), None))
_unpack.defvjp(_keep(_unpack), lambda p, g: (_pack(g, p), None))
