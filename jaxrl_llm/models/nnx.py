"""Any causal `flax.nnx` module as a `Model`: correct for every module, fast for none."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from jaxrl_llm.models.model import Cache, Model
from jaxrl_llm.types import Context, PyTree


def nnx_model(module: nnx.Module, *, vocab: int) -> Model:
    """Adapts a module called as `module(tokens [N L], positions [N L], mask [N L]) -> logits [N L V]`.

    Slow by construction: the prefix is computed once per response, and every decoded token recomputes its row; use it
    to try a network, `transformer` to train one. Its "hidden state" is the logits themselves (`width == vocab`), so
    chunked scoring saves nothing either.

    Args:
      module: the network, split once: its `nnx.Param`s become the parameters, every other variable is frozen. Rows have
          gaps: a key may be attended iff it stands at or before the query and `mask` is True there, and `positions`,
          not columns, say how far apart tokens are. Dropout and other randomness must be off.
      vocab: `V`.

    Returns:
      a `Model` whose `init` returns the module's own parameters, whatever the key.
    """
    graph, params, rest = nnx.split(module, nnx.Param, ...)  # type: ignore[misc]
    run = functools.partial(_run, graph, params, rest)
    return Model(
        vocab=vocab,
        width=vocab,
        init=functools.partial(_init, params.to_pure_dict()),
        hidden=functools.partial(_hidden, run),
        logits=_logits,
        prefill=_prefill,
        decoder=_decoder,
        empty=_empty,
        decode=functools.partial(_decode, run),
    )


def _run(graph: Any, like: Any, rest: Any, params: PyTree, tokens: Array, positions: Array, mask: Array) -> Array:
    """`[N L] -> [N L V]` float32."""
    # Structure from the module, values from the caller: the state itself is never written to.
    state = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(params))
    logits: Array = nnx.merge(graph, state, rest)(tokens, positions, mask)
    return logits.astype(jnp.float32)


def _init(params: PyTree, key: Array) -> PyTree:
    del key  # the module came with its parameters
    return jax.tree.map(jnp.asarray, params)


def _logits(params: PyTree, hidden: Array) -> Array:
    return hidden


def _hidden(run: Any, params: PyTree, prefix: Context, offset: Array, inputs: Array, attended: Array) -> Array:
    m, r, t = inputs.shape
    exists = jnp.concatenate([jnp.ones((m, r, 1), bool), attended[..., :-1]], axis=-1)
    return _rows(run, params, prefix.tokens, prefix.mask, offset, inputs, exists)[..., -t:, :]


def _rows(run: Any, params: PyTree, tokens: Array, mask: Array, offset: Array, inputs: Array, exists: Array) -> Array:
    """Whole rows, prefix and response side by side: `[M R S + T V]`."""
    (m, r, t), s = inputs.shape, tokens.shape[-1]

    def rows(x: Array, y: Array) -> Array:
        return jnp.concatenate([jnp.broadcast_to(x[:, None], (m, r, s)), y], axis=-1).reshape(m * r, s + t)

    here = jnp.broadcast_to(offset[:, None, None] + jnp.arange(t), (m, r, t))
    positions = rows(jnp.broadcast_to(jnp.arange(s), (m, s)), here)
    logits: Array = run(params, rows(tokens, inputs), positions, rows(mask, exists))
    return logits.reshape(m, r, s + t, -1)


def _prefill(params: PyTree, prefix: Context) -> Cache:
    return prefix.tokens


def _decoder(params: PyTree) -> PyTree:
    return params


def _empty(m: int, r: int, t: int) -> Cache:
    return jnp.zeros((m, r, t), jnp.int32)


def _decode(
    run: Any,
    params: PyTree,
    prefix: Cache,
    mask: Array,
    cache: Cache,
    offset: Array,
    inputs: Array,
    t: Array,
    column: Array | None = None,
) -> tuple[Array, Cache]:
    """The cache is the inputs so far, a ring written at `column`; the row is computed again and read at `t`."""
    t, column = (jnp.broadcast_to(x, inputs.shape)[..., None] for x in (t, t if column is None else column))
    place = jnp.arange(cache.shape[-1])
    cache = jnp.where(place == column, inputs[..., None], cache)
    row = jnp.take_along_axis(cache, (column - t + place) % cache.shape[-1], axis=-1)
    logits = _rows(run, params, prefix, mask, offset, row, place <= t)[..., -cache.shape[-1] :, :]
    return jnp.take_along_axis(logits, t[..., None], axis=-2)[..., 0, :], cache
