"""Slot refill: continuous batching inside one compiled loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrl_llm.models.attention import write
from jaxrl_llm.models.model import Cache, Model
from jaxrl_llm.rollouts.distribution import draw
from jaxrl_llm.rollouts.ending import Ending, anywhere
from jaxrl_llm.types import PyTree, Samples, Sampling, record


@record
class Pending:
    """What is to be sampled: `M` encoded contexts with `R` rows each."""

    prefix: Cache  # leaves [M ...]
    mask: Array  # [M S] bool
    offset: Array  # [M] int32
    last: Array  # [M] int32, the context's last token
    numbers: Array  # [M R T] float32, the noise
    sampling: Sampling  # leaves [M R]
    limit: Array  # [M R] int32, the most tokens
    recent: Array  # [M L] int32, the response's last tokens before it goes on


@record
class _Slots:
    """`W` rows in the making. `N = M * R` rows in all; row `N` is nobody."""

    i: Array  # [] int32, steps so far
    next: Array  # [] int32, the first row no slot has had
    row: Array  # [W] int32
    t: Array  # [W] int32, tokens the row has
    current: Array  # [W] int32, what is fed next
    recent: Array  # [W L] int32
    prefix: Cache  # leaves [W ...]
    mask: Array  # [W S] bool
    cache: Cache
    place: Array  # [2 N] int32: step and slot of each row's first token
    written: tuple[Array, ...]  # token, log-prob, entropy, row, whether it ended the row, each [I W]


def refilled(model: Model, params: PyTree, pending: Pending, ending: Ending, slots: int) -> Samples:
    """Samples `M * R` rows, `slots` (fewer than that) at a time; a row that ends is replaced before the next step.

    All slots write their keys and values to one column of a cache that is used in a circle, whatever the length of
    their rows, so that a step moves no more data than without refill. Results are logged by step and put in order at
    the end.

    Returns:
      samples `[M R T]`.
    """
    m, r, length = pending.numbers.shape
    n = m * r
    decoder = model.decoder(params)
    numbers = pending.numbers.reshape(n, length)
    sampling = jax.tree.map(lambda x: x.reshape(n), pending.sampling)
    limit = pending.limit.reshape(n)
    ceiling = -(-n // slots) * length  # the j-th row starts at step (j // slots) * length at the latest

    def going(state: _Slots) -> Array:
        return anywhere((state.next < n) | jnp.any(state.row < n))

    def step(state: _Slots) -> _Slots:
        state = _fill(state, pending)
        row = jnp.minimum(state.row, n - 1)
        hidden, cache = model.decode(
            decoder,
            state.prefix,
            state.mask,
            state.cache,
            pending.offset[row // r],
            state.current[:, None],
            state.t[:, None],
            column=state.i % length,
        )
        logits = model.logits(params, hidden[:, 0])
        token, logp, entropy = draw(numbers[row, state.t], logits, jax.tree.map(lambda x: x[row], sampling))
        recent, ends = ending(state.recent, token)
        new = (token, logp, entropy, state.row, ends)
        return _Slots(
            i=state.i + 1,
            next=state.next,
            row=jnp.where(ends | (state.t + 1 >= limit[row]), n, state.row),
            t=jnp.minimum(state.t + 1, length - 1),
            current=token,
            recent=recent,
            prefix=state.prefix,
            mask=state.mask,
            cache=cache,
            place=state.place,
            written=tuple(write(x, y, state.i, -2) for x, y in zip(state.written, new, strict=True)),
        )

    empty = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape[1:]), x.dtype), (pending.prefix, pending.mask))
    state = _Slots(
        i=jnp.int32(0),
        next=jnp.int32(0),
        row=jnp.full(slots, n, jnp.int32),
        t=jnp.zeros(slots, jnp.int32),
        current=jnp.zeros(slots, jnp.int32),
        recent=ending.empty((slots,)),
        prefix=empty[0],
        mask=empty[1],
        cache=model.empty(slots, 1, length),
        place=jnp.zeros((2, n), jnp.int32),
        written=tuple(
            jnp.full((ceiling, slots), fill, dtype)
            for fill, dtype in ((0, jnp.int32), (0, jnp.float32), (0, jnp.float32), (n, jnp.int32), (0, bool))
        ),
    )
    return _ordered(lax.while_loop(going, step, state), pending.limit, length)


def _fill(state: _Slots, pending: Pending) -> _Slots:
    """Gives every free slot the next pending row, if there is one."""
    m, r, _ = pending.numbers.shape
    n = m * r
    free = state.row == n
    row = jnp.where(free, state.next + jnp.cumsum(free, dtype=jnp.int32) - 1, state.row)
    row = jnp.minimum(row, n)
    new = free & (row < n)
    everything = pending.prefix, pending.mask

    def copy(carry: tuple[Array, tuple[Cache, Array], Array]) -> tuple[Array, tuple[Cache, Array], Array]:
        todo, mine, place = carry
        slot = jnp.argmax(todo)
        filled = jnp.minimum(row[slot], n - 1)
        # Under vmap a member that has nothing to do rewrites what is there.
        mine = jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, jnp.where(todo[slot], y[filled // r], x[slot]), slot, 0),
            mine,
            everything,
        )
        here = jnp.where(todo[slot], jnp.stack([state.i, slot]), place[:, filled])
        return todo.at[slot].set(False), mine, lax.dynamic_update_index_in_dim(place, here, filled, 1)

    start = new, (state.prefix, state.mask), state.place
    _, (prefix, mask), place = lax.while_loop(lambda carry: anywhere(carry[0]), copy, start)
    return _Slots(
        i=state.i,
        next=state.next + new.sum(dtype=jnp.int32),
        row=row,
        t=jnp.where(free, 0, state.t),
        current=jnp.where(new, pending.last[jnp.minimum(row, n - 1) // r], state.current),
        recent=jnp.where(free[:, None], pending.recent[jnp.minimum(row, n - 1) // r], state.recent),
        prefix=prefix,
        mask=mask,
        cache=state.cache,
        place=place,
        written=state.written,
    )


def _ordered(state: _Slots, limit: Array, length: int) -> Samples:
    m, r = limit.shape
    first, slot = state.place
    i = jnp.minimum(first[:, None] + jnp.arange(length), state.written[0].shape[0] - 1)
    token, logp, entropy, row, ended = (x[i, slot[:, None]] for x in state.written)
    # A row's tokens are consecutive in its slot; what follows them there is another's.
    mask = (row == jnp.arange(m * r)[:, None]) & (limit.reshape(-1, 1) > 0)
    token, logp, entropy = (jnp.where(mask, x, 0).reshape(m, r, length) for x in (token, logp, entropy))
    truncated = ~jnp.any(mask & ended, axis=-1)
    return Samples(
        tokens=token,
        mask=mask.reshape(m, r, length),
        logp=logp,
        entropy=entropy,
        truncated=truncated.reshape(m, r),
    )
