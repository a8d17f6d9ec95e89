"""Attention by JAX's splash kernel for TPUs: no array of queries by keys is ever in memory, forwards or backwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.sharding import ROWS, fitted

BLOCK = 128  # queries and keys of one tile are a multiple of this; lengths are padded to it


def causal(q: Array, k: Array, v: Array, mask: Array, *, scale: float | None = None, interpret: bool = False) -> Array:
    """Causal attention of right-padded rows to themselves, as `attention.causal`.

    Args:
      q: `[M L H d]`, k, v: `[M L K d]`; mask: `[M L]` bool, attended keys.
      scale: queries are multiplied by it; None: `d ** -0.5`.
      interpret: run the kernel without a TPU, slowly.

    Returns:
      `[M L H d]`.
    """
    return _on_rows(q, k, v, mask, 0, scale, interpret)


def shared_prefix(
    q: Array,
    prefix: tuple[Array, Array, Array],
    own: tuple[Array, Array, Array],
    *,
    scale: float | None = None,
    interpret: bool = False,
) -> Array:
    """Attention of responses to a prefix and themselves, as `attention.shared_prefix`.

    Here the prefix's keys and values are repeated for each response: they are small next to the scores that are saved.

    Args:
      q: `[M R T H d]`.
      prefix: keys and values `[M S K d]`, mask `[M S]` bool.
      own: keys and values `[M R T K d]`, and `[M R T]` bool: those that exist; causality is added.
      scale, interpret: as `causal`.

    Returns:
      `[M R T H d]`.
    """
    (pk, pv, pmask), (ok, ov, exists) = prefix, own
    m, r, t = q.shape[:3]

    def joined(far: Array, near: Array) -> Array:
        far = jnp.broadcast_to(far[:, None], (m, r, *far.shape[1:]))
        return jnp.concatenate([far, near], axis=2).reshape(m * r, -1, *far.shape[3:])

    flat = q.reshape(m * r, t, *q.shape[3:])
    out = _on_rows(flat, joined(pk, ok), joined(pv, ov), joined(pmask, exists), pk.shape[1], scale, interpret)
    return out.reshape(q.shape)


def _on_rows(q: Array, k: Array, v: Array, mask: Array, offset: int, scale: float | None, interpret: bool) -> Array:
    """On each device the rows and heads it has: a kernel cannot be split by the compiler."""
    where = jax.sharding.get_abstract_mesh()
    of = functools.partial(_attention, offset=offset, scale=scale, interpret=interpret)
    if where.empty:
        return of(q, k, v, mask)
    shared = k.shape[2] % where.shape.get("tensor", 1) == 0
    heads = fitted(where.shape, (ROWS, None, "tensor" if shared else None), k.shape)
    rows = fitted(where.shape, (ROWS,), mask.shape)
    split = jax.shard_map(
        of, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False, axis_names=set(where.axis_names)
    )
    out: Array = split(q, k, v, mask)
    return out


def _attention(
    q: Array, k: Array, v: Array, mask: Array, *, offset: int, scale: float | None, interpret: bool
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads, dim = q.shape[1:]
    q = (q * (dim**-0.5 if scale is None else scale)).astype(q.dtype)
    q, k, v, seen = _padded(q), _padded(k), _padded(v), _padded(mask)
    size = q.shape[1], k.shape[1]
    # Query t stands at offset + t; what was appended to either side is hidden by causality or by the mask.
    causality = masks.MultiHeadMask([masks.CausalMask(size, offset=offset) for _ in range(heads)])
    attend = kernels.make_splash_mha(causality, head_shards=1, q_seq_shards=1, interpret=interpret)
    ids = kernels.SegmentIds(q=jnp.ones(q.shape[:2], jnp.int32), kv=seen.astype(jnp.int32))
    out: Array = jax.vmap(attend)(*(jnp.swapaxes(x, 1, 2) for x in (q, k, v)), ids)
    return jnp.swapaxes(out, 1, 2)[:, :length].astype(v.dtype)


def _padded(x: Array) -> Array:
    gap = [(0, 0)] * x.ndim
    gap[1] = (0, -x.shape[1] % BLOCK)
    return jnp.pad(x, gap)
