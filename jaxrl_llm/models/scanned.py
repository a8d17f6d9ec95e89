"""Decoding as a scan over layers: one layer to compile, however deep the model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.attention import one_token, rotary
from jaxrl_llm.models.model import Cache, Model
from jaxrl_llm.models.transformer import Block, Transformer, TransformerConfig, transformer
from jaxrl_llm.types import Context, PyTree

LAYERS = 2  # the axis of layers in a cache: after rows and heads, so that both are where other code looks for them


def scanned(config: TransformerConfig) -> Model:
    """`transformer(config)` whose `decode` loops over layers inside the program instead of writing each of them out.

    The same parameters and results. The program is smaller by as many times as there are layers, in each of the
    sampler's loops; a layer's weights and cache are read where they stand, in one array for all layers. On a CPU it is
    slower than writing the layers out.
    """
    c, model = config, transformer(config)

    def stacked(caches: list[tuple[Array, Array]]) -> Cache:
        """`[M K L d S]` and `[M K L S d]`, of one pair a layer."""
        four = [tuple(x[:, None] if x.ndim == 3 else x for x in pair) for pair in caches]
        return jax.tree.map(lambda *xs: jnp.stack(xs, LAYERS), *four)

    def prefill(params: PyTree, prefix: Context) -> Cache:
        return stacked(model.prefill(params, prefix))

    def empty(m: int, r: int, t: int) -> Cache:
        lead = (m * r, c.num_key_value_heads, c.num_hidden_layers)
        return jnp.zeros((*lead, c.head_dim, t), c.dtype), jnp.zeros((*lead, t, c.head_dim), c.dtype)

    def decoder(params: PyTree) -> PyTree:
        return {**params, "layers": jax.tree.map(lambda x: x.astype(c.dtype), params["layers"])}

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
        whole = Transformer(c, _attend_layer)
        angles = rotary(offset[:, None] + jnp.broadcast_to(t, inputs.shape), c.head_dim, c.rope_theta)
        block = Block(c, _attend_layer)

        def layer(carry: tuple[Array, Cache], each: tuple[Array, PyTree]) -> tuple[tuple[Array, Cache], None]:
            (x, cache), (i, weights) = carry, each
            seen = (prefix, mask, cache, i, t, t if column is None else column)
            return block.apply({"params": weights}, x, angles, seen), None  # type: ignore[return-value]

        x: Any = whole.apply(outer, inputs, method="embedding")
        (x, cache), _ = jax.lax.scan(layer, (x, cache), (jnp.arange(c.num_hidden_layers), params["layers"]))
        x = whole.apply(outer, x, method="final")
        return x, cache

    return dataclasses.replace(model, prefill=prefill, empty=empty, decoder=decoder, decode=decode)


def _attend_layer(q: Array, k: Array, v: Array, seen: Any) -> tuple[Array, Cache]:
    """One new token per response, `[M R H d]`: written into layer `i` of the cache, and attending to that layer."""
    prefix, pmask, (ck, cv), i, t, column = seen
    of = functools.partial(jax.lax.dynamic_index_in_dim, index=i, axis=LAYERS, keepdims=False)
    rows, place = ck.shape[:2], jnp.arange(ck.shape[-1])
    ck, cv = _written(ck, k.reshape(*rows, -1), i, column, -1), _written(cv, v.reshape(*rows, -1), i, column, -2)
    age = column[..., None] - place
    own = jnp.where(age < 0, age + place.size, age) <= t[..., None]
    return one_token(q, (*map(of, prefix), pmask), (of(ck), of(cv), own)), (ck, cv)


def _written(cache: Array, new: Array, i: Array, column: Array, axis: int) -> Array:
    """`cache` with `new` `[M R K d]` in column `column` (`[]` or `[M R]`) of layer `i`."""
    new = jnp.expand_dims(new, axis)
    if not column.ndim:
        start = [0] * cache.ndim
        return jax.lax.dynamic_update_slice(
            cache, new[:, :, None], [*start[:LAYERS], i, *(column if j == axis else 0 for j in (-2, -1))]
        )
    place = jnp.arange(cache.shape[axis])
    here = (place == column.reshape(-1, 1))[:, None]
    here = jnp.expand_dims(here, -3 - axis)
    old = jax.lax.dynamic_index_in_dim(cache, i, LAYERS, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(cache, jnp.where(here, new, old), i, LAYERS)
