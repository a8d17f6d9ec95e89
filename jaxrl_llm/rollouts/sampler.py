"""The autoregressive sampler: one prefill a context, one loop of single-token steps, one key a row."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrl_llm.models.attention import write
from jaxrl_llm.models.model import Cache, Model, prefix_of
from jaxrl_llm.models.restricted import restricted
from jaxrl_llm.rollouts.distribution import draw, uniform
from jaxrl_llm.rollouts.ending import Ending, anywhere
from jaxrl_llm.rollouts.refill import Pending, refilled
from jaxrl_llm.types import Context, Decoding, Memory, PyTree, Samples, Sampling, Steer, record

# Every piece is a loop of its own to compile, and saves a part of the attention to what is not there yet.
PIECES, SHORTEST = 4, 32


def sample(
    model: Model,
    params: PyTree,
    keys: Array,
    context: Context,
    sampling: Sampling,
    *,
    length: int,
    eos: tuple[int, ...] = (),
    stop: tuple[tuple[int, ...], ...] = (),
    slots: int | None = None,
    limit: Array | None = None,
    until: Callable[[Array], Array] | None = None,
    own: Array | None = None,
    within: tuple[PyTree, Callable[[Array], Array]] | None = None,
    steer: Steer | None = None,
) -> Samples:
    """Draws one response a key.

    Token `t` of a row depends on its key, its context and `t` only, not on the batch it sits in. The loop ends with the
    last row (under `vmap`, with the last row of all members).

    Args:
      model: what to sample from.
      params: its parameters.
      keys: `[B G]` typed keys.
      context: `[B C S]`, each encoded once for the `G / C` consecutive rows that share it.
      sampling: leaves scalar or `[B G]`; changing their values compiles nothing.
      length: `T`, the most tokens a response has.
      eos: tokens that end a response. They are sampled tokens: part of the response and of its mask.
      stop: token sequences that end a response once its last tokens equal one of them. They stay in the response.
      slots: how many rows are decoded at a time; a row that ends makes room for the next one inside the loop. None
        decodes all rows at once. The responses are the same; memory is that of `slots` rows with a prefix each.
      limit: `[B G]` int32, the most tokens of each row where that is less than `length`; 0 for a row without any.
      until: `(ended [B G] bool) -> bool`: once true, no row gets another token. `ended` rows met EOS, a stop sequence
        or their limit. With it all rows are decoded at once.
      own: `[B C]` int32, how many of a context's last tokens are the beginning of its responses: a stop sequence may
        start among them. None if the responses start after the context.
      within: other parameters of the model, and `(their logits [... V]) -> [... V]` bool: the tokens to draw from,
        before `sampling` filters them. Decodes both, at twice the price.
      steer: lets rows continue others and chooses tokens, see there; the rows of a prompt share its context. With it
        all rows are decoded at once, and a copied cache is paid for in the steps in which rows continue others.

    Returns:
      `[B G T]` samples; `truncated` rows ended neither at EOS nor with a stop sequence.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    (b, g), (_, c, s) = keys.shape, context.tokens.shape
    if context.tokens.shape[0] != b or c == 0 or g % c:
        shape = context.tokens.shape
        raise ValueError(f"context must be [B C S] with B={b} and C a divisor of G={g} to fit keys, got {shape}")
    if length < 1 or (slots is not None and slots < 1):
        raise ValueError(f"length and slots must be at least 1, got length={length}, slots={slots}")
    if steer is not None and c > 1:
        raise ValueError(f"steer: the rows of a prompt continue each other in one context, got C={c}")
    if b * g == 0:
        return _nothing((b, g), length)
    if within is not None:
        model, params = restricted(model, within[1]), (params, within[0])
    m, r = b * c, g // c
    ending = Ending(eos=tuple(eos), stop=tuple(map(tuple, stop)))
    context = jax.tree.map(lambda x: x.reshape(m, s), context)
    prefix, offset, last = prefix_of(context)
    limit = jnp.full((b, g), length) if limit is None else jnp.minimum(limit, length)
    steps = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys.reshape(-1), jnp.arange(length))
    pending = Pending(
        prefix=model.prefill(params, prefix),
        mask=prefix.mask,
        offset=offset,
        last=last,
        numbers=uniform(steps).reshape(m, r, length),
        sampling=jax.tree.map(lambda x: jnp.broadcast_to(jnp.asarray(x), (b, g)).reshape(m, r), sampling),
        limit=limit.reshape(m, r),
        recent=ending.empty((m,)) if own is None else ending.after(context, own.reshape(m)),
    )
    if steer is not None or until is not None or slots is None or slots >= b * g:
        enough = None if until is None else lambda ended: until(ended.reshape(b, g))
        samples = _at_once(model, params, pending, ending, enough, steer)
    else:
        samples = refilled(model, params, pending, ending, slots)
    return Samples(**{name: x.reshape(b, g, *x.shape[2:]) for name, x in vars(samples).items()})


def _nothing(shape: tuple[int, int], length: int) -> Samples:
    zeros = functools.partial(jnp.zeros, (*shape, length))
    return Samples(
        tokens=zeros(jnp.int32),
        mask=zeros(bool),
        logp=zeros(jnp.float32),
        entropy=zeros(jnp.float32),
        truncated=jnp.zeros(shape, bool),
    )


@record
class _Rows:
    """All rows after `t` tokens."""

    t: Array  # [] int32
    cache: Cache
    current: Array  # [M R] int32, what is fed next
    alive: Array  # [M R] bool: to be continued
    ended: Array  # [M R] bool: at EOS or with a stop sequence
    recent: Array  # [M R L] int32
    written: tuple[Array, ...]  # token, log-prob, entropy, mask, each [T M R]
    memory: Memory = ()  # of the steer


def _at_once(
    model: Model,
    params: PyTree,
    pending: Pending,
    ending: Ending,
    enough: Callable[[Array], Array] | None,
    steer: Steer | None,
) -> Samples:
    m, r, length = pending.numbers.shape
    limit = pending.limit
    decoder = model.decoder(params)
    numbers = jnp.moveaxis(pending.numbers, -1, 0)

    def going(rows: _Rows, end: int) -> Array:
        return (rows.t < end) & anywhere(rows.alive)

    def step(rows: _Rows) -> _Rows:
        t = rows.t
        hidden, cache = model.decode(decoder, pending.prefix, pending.mask, rows.cache, pending.offset, rows.current, t)
        rows = dataclasses.replace(rows, cache=cache)
        number, logits, given = numbers[t], model.logits(params, hidden), None
        if steer is not None:
            rows, logits, given = _steered(steer, rows, logits, limit)
        alive = rows.alive
        drawn = draw(number, logits, pending.sampling, given)
        recent, ends = ending(rows.recent, drawn[0])
        new = (*(jnp.where(alive, x, 0) for x in drawn), alive)
        written = tuple(write(x, y, t, -3) for x, y in zip(rows.written, new, strict=True))
        ended = rows.ended | (alive & ends)
        alive = alive & ~ends & (t + 1 < limit)
        if enough is not None:
            alive &= ~enough(ended | (t + 1 >= limit))
        rows = dataclasses.replace(rows, alive=alive, ended=ended, recent=recent, written=written)
        return dataclasses.replace(rows, t=t + 1, current=new[0])

    zeros = functools.partial(jnp.zeros, (length, m, r))
    alive = limit > 0
    rows = _Rows(
        t=jnp.int32(0),
        cache=model.empty(m, r, 0),
        current=jnp.broadcast_to(pending.last[:, None], (m, r)),
        alive=alive if enough is None else alive & ~enough(~alive),
        ended=jnp.zeros((m, r), bool),
        recent=jnp.repeat(pending.recent[:, None], r, axis=1),
        written=(zeros(jnp.int32), zeros(jnp.float32), zeros(jnp.float32), zeros(bool)),
        memory=() if steer is None else steer.init((m, r)),
    )
    for end in _segments(length):
        cache = jax.tree.map(_grown, model.empty(m, r, end), rows.cache)
        rows = lax.while_loop(functools.partial(going, end=end), step, dataclasses.replace(rows, cache=cache))
    tokens, logp, entropy, mask = (jnp.moveaxis(x, 0, -1) for x in rows.written)
    return Samples(tokens=tokens, mask=mask, logp=logp, entropy=entropy, truncated=~rows.ended)


def _steered(steer: Steer, rows: _Rows, logits: Array, limit: Array) -> tuple[_Rows, Array, Array]:
    """The rows that go on, the logits of their next tokens `[M R V]`, and the tokens they are given `[M R]`."""
    tokens, mask = (jnp.moveaxis(rows.written[i], 0, -1) for i in (0, 3))
    seen = Decoding(t=rows.t, logits=logits, tokens=tokens, mask=mask, alive=rows.alive)
    memory, source, token = steer.apply(rows.memory, seen)
    own = jnp.broadcast_to(jnp.arange(source.shape[1], dtype=source.dtype), source.shape)
    # Most steps change no row, and copying a cache costs as much as attending to it.
    rows, logits = lax.cond(anywhere(source != own), _taken_over, _as_they_are, rows, logits, source)
    return dataclasses.replace(rows, alive=rows.alive & (rows.t < limit), memory=memory), logits, token


def _as_they_are(rows: _Rows, logits: Array, source: Array) -> tuple[_Rows, Array]:
    return rows, logits


def _taken_over(rows: _Rows, logits: Array, source: Array) -> tuple[_Rows, Array]:
    """Each row with the past of its `source` `[M R]`; without any where that is -1."""
    m, r = source.shape
    there, source = source >= 0, jnp.maximum(source, 0)
    flat = (jnp.arange(m)[:, None] * r + source).reshape(-1)

    def taken(x: Array) -> Array:
        return x[flat] if x.shape[0] == m * r else x.reshape(m * r, *x.shape[2:])[flat].reshape(x.shape)

    alive, ended = taken(rows.alive) & there, taken(rows.ended) & there
    written = tuple(jnp.where(there, jnp.take_along_axis(x, source[None], -1), 0).astype(x.dtype) for x in rows.written)
    cache, recent = jax.tree.map(taken, (rows.cache, rows.recent))
    rows = dataclasses.replace(rows, cache=cache, alive=alive, ended=ended, recent=recent, written=written)
    return rows, taken(logits)


def _segments(length: int) -> list[int]:
    """Cache sizes, one loop each: steps attend to columns not yet written, so the cache grows with the responses."""
    pieces = min(PIECES, max(1, length // SHORTEST))
    return [-(-length * (i + 1) // pieces) for i in range(pieces)]


def _grown(new: Array, old: Array) -> Array:
    return old if new.shape == old.shape else lax.dynamic_update_slice(new, old, (0,) * new.ndim)
