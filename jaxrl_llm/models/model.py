"""What the library asks of a language model: pure functions on plain pytrees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Context, PyTree

Cache = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """Small trained parameters on a frozen base: a run keeps one base, and adapters for each role that has weights.

    base: `(params) -> base`, the frozen part as it is kept (quantised, if it is), in buffers of its own.
    own: `(params) -> adapters`, those among the parameters; None if there are none.
    fresh: `(key) -> adapters` that change nothing.
    join: `(base, adapters) -> params`, what the model's functions take; copies nothing.
    merge: `(base, adapters) -> params` of the model without adapters.
    """

    base: Callable[[PyTree], PyTree]
    own: Callable[[PyTree], PyTree | None]
    fresh: Callable[[Array], PyTree]
    join: Callable[[PyTree, PyTree], PyTree]
    merge: Callable[[PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A decoder-only language model as functions of its parameters.

    `M` contexts, `R` responses of each, `T` tokens a response. A context is encoded once for its `R` responses.
    Response input 0 is the context's last token and input `t` is token `t - 1`, so output `t` predicts token `t`; the
    *prefix* is the context without its last token. See `inputs_of`.

    init: `(key) -> params`.
    hidden: `(params, prefix: Context [M S], offset [M], inputs [M R T], attended [M R T]) -> [M R T D]`, the final
        hidden states; `offset` is the prefix length, the position of input 0.
    inner: as `hidden`, with the keyword `layer` (from 0): what that layer leaves to the next, without the final norm;
        None if the model has no layers to look into.
    packed: as `hidden`, with the keyword `packing`: `[shards N D]`, only the tokens it holds; None if the model cannot.
    logits: `(params, hidden [... D]) -> [... V]` float32.
    prefill: `(params, prefix: Context [M S]) -> Cache`, encodes the prefixes; `M` leads every leaf. `S` may be 0.
    decoder: `(params) -> PyTree`, what `decode` wants instead of `params`: cast and sliced once per generation.
    empty: `(M, R, T) -> Cache` for the responses; `M R` leads every leaf, as two axes or one, and a longer `T` only
        makes leaves longer.
    decode: `(decoder, prefix_cache, prefix_mask [M S], cache, offset [M], inputs [M R], t, column=None) -> (hidden
        [M R D], cache)` feeds one token of each response at position `t` (`[]`, or `[M R]` if rows differ). What it
        keeps is written at `column` (`[]`, default `t`) of the cache, used in a circle: a row reads the `t` columns
        before it.
    dtype: of the computation, and of the hidden states.
    wrapped: `(wrap=function) -> Model`, with each of its Flax Linen modules changed by a function; None if it has none.
    adapter: of a model whose parameters are adapters on a base; None if all of them are trained.
    """

    vocab: int
    width: int
    init: Callable[[Array], PyTree]
    hidden: Callable[..., Array]
    logits: Callable[[PyTree, Array], Array]
    prefill: Callable[[PyTree, Context], Cache]
    decoder: Callable[[PyTree], PyTree]
    empty: Callable[[int, int, int], Cache]
    decode: Callable[..., tuple[Array, Cache]]
    inner: Callable[..., Array] | None = None
    packed: Callable[..., Array] | None = None
    dtype: Any = jnp.float32
    wrapped: Callable[..., Model] | None = None
    adapter: Adapter | None = None


def prefix_of(context: Context) -> tuple[Context, Array, Array]:
    """Splits the last real token off.

    Args:
      context: `[..., S]`.

    Returns:
      the prefix `[..., S - 1]` (right-padded, masked tokens 0), its length `[...]` int32, and the last token `[...]`.
    """
    length = context.mask.sum(-1, dtype=jnp.int32) - 1
    last = jnp.take_along_axis(context.tokens, jnp.maximum(length, 0)[..., None], axis=-1)[..., 0]
    mask = jnp.arange(context.tokens.shape[-1] - 1) < length[..., None]
    return Context(tokens=jnp.where(mask, context.tokens[..., :-1], 0), mask=mask), length, last


def longer(prefix: Context, n: int) -> Context:
    """The prefix with `n` masked tokens more, which change nothing."""
    wide = ((0, 0),) * (prefix.tokens.ndim - 1) + ((0, n),)
    return jax.tree.map(lambda x: jnp.pad(x, wide), prefix) if n else prefix


def inputs_of(last: Array, tokens: Array, attended: Array) -> Array:
    """Response inputs: the context's last token `[M]`, then the response `[M R T]` shifted by one; padding is 0."""
    tokens = jnp.where(attended, tokens, 0)
    first = jnp.broadcast_to(last[:, None, None], (*tokens.shape[:2], 1))
    return jnp.concatenate([first, tokens[..., :-1]], axis=-1)


def separate_prefixes(model: Model) -> Model:
    """The model with `hidden` in the plain layout: every response behind a copy of its own of the prefix.

    The same hidden states and gradients for more work, to compare with (Prefix Grouper, 2506.05433). Sampling still
    encodes a context once.
    """
    return dataclasses.replace(model, hidden=functools.partial(_separate, model.hidden), packed=None)


def _separate(
    hidden: Callable[..., Array], params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array
) -> Array:
    m, r, t = inputs.shape
    prefix, offset = jax.tree.map(lambda x: jnp.repeat(x, r, axis=0), (prefix, offset))
    out = hidden(params, prefix, offset, inputs.reshape(m * r, 1, t), attended.reshape(m * r, 1, t))
    return out.reshape(m, r, t, -1)
