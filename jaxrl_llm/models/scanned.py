"""Decoding as a scan over layers: one layer to compile, however deep the model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.attend import attend_keep, attend_written
from jaxrl_llm.models.attention import Rule
from jaxrl_llm.models.model import Cache, Model
from jaxrl_llm.models.transformer import (
    Block,
    Transformer,
    TransformerConfig,
    Wrap,
    _angles,
    _cast,
)
from jaxrl_llm.types import Context, PyTree

LAYERS = 2  # the axis of layers in a cache: after rows and heads, so that both are where other code looks for them


def scanned(config: TransformerConfig, model: Model, wrapped: Wrap) -> Model:
    """`model`, a transformer, whose `decode` loops over layers inside the program instead of writing each of them out.

    The same parameters and results. The program is smaller by as many times as there are layers, in each of the
    sampler's loops; a layer's weights and cache are read where they stand, in one array for all layers. On a CPU it is
    slower than writing the layers out. `wrapped` changes its Flax modules.
    """
    c = config

    def prefill(params: PyTree, prefix: Context) -> Cache:
        m, s = prefix.tokens.shape
        if s == 0:
            return empty(m, 1, 0)
        positions = jnp.broadcast_to(jnp.arange(s), (m, s))
        whole = wrapped(Transformer(c, attend_keep))
        kept: Cache = whole.apply({"params": params}, prefix.tokens, positions, prefix.mask)[1]
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, LAYERS), kept)

    def empty(m: int, r: int, t: int) -> Cache:
        lead = (m * r, c.num_key_value_heads, c.num_hidden_layers)
        return jnp.zeros((*lead, c.head_dim, t), c.dtype), jnp.zeros((*lead, t, c.head_dim), c.dtype)

    def decoder(params: PyTree) -> PyTree:
        return {**params, "layers": _cast(params["layers"], c.dtype)}

    def decode(
        params: PyTree,
        prefix: Cache,
        mask: Array,
        cache: Cache,
        offset: Array,
        inputs: Array,
        t: Array,
        column: Array | None = None,
    ) -> tuple[Array, Cache]:
        outer = {"params": {k: v for k, v in params.items() if k != "layers"}}
        whole = wrapped(Transformer(c, _attend_layer))
        angles = _angles(c, offset[:, None] + jnp.broadcast_to(t, inputs.shape))
        block = wrapped(Block(c, _attend_layer))
        local = jnp.array(c.sliding) if len(set(c.sliding)) > 1 else None

        def layer(carry: tuple[Array, Cache], each: tuple[Array, PyTree, Any]) -> tuple[tuple[Array, Cache], None]:
            (x, cache), (i, weights, local) = carry, each
            seen = (prefix, mask, cache, i, (offset, t, t if column is None else column))
            out: tuple[Array, Cache] = block.apply({"params": weights}, x, angles, seen, local)
            return out, None

        x: Any = whole.apply(outer, inputs, method="embedding")
        (x, cache), _ = jax.lax.scan(layer, (x, cache), (jnp.arange(c.num_hidden_layers), params["layers"], local))
        x = whole.apply(outer, x, method="final")
        return x, cache

    return dataclasses.replace(model, prefill=prefill, empty=empty, decoder=decoder, decode=decode)


def _attend_layer(q: Array, k: Array, v: Array, seen: Any, rule: Rule) -> tuple[Array, Cache]:
    """One new token per response, `[M R H d]`: written into layer `i` of the cache, and attending to that layer."""
    prefix, mask, (ck, cv), i, at = seen
    of = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=LAYERS, keepdims=False)
    rows, column = ck.shape[:2], at[-1]
    ck, cv = _written(ck, k.reshape(*rows, -1), i, column, -1), _written(cv, v.reshape(*rows, -1), i, column, -2)
    return attend_written(q, (*map(of, prefix), mask), (of(ck), of(cv)), at, rule), (ck, cv)


def _written(cache: Array, new: Array, i: Array, column: Array, axis: int) -> Array:
    """`cache` with `new` `[M R K d]` in column `column` (`[]` or `[M R]`) of layer `i`."""
    new = jnp.expand_dims(new, axis)
    if not column.ndim:
        start: list[Any] = [0, 0, i, 0, 0]
        start[axis] = column
        return jax.lax.dynamic_update_slice(cache, new[:, :, None], start)
    here = jnp.arange(cache.shape[axis]) == column.reshape(-1, 1)
    here = jnp.expand_dims(here[:, None], -3 - axis)
    old = jax.lax.dynamic_index_in_dim(cache, i, LAYERS, keepdims=False)
    out: Array = jax.lax.dynamic_update_index_in_dim(cache, jnp.where(here, new, old), i, LAYERS)
    return out
