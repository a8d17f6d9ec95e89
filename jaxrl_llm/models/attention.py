"""Attention of grouped responses: to the prefix they share, and to themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

FAR = -1e30  # finite, so that a row with nothing to attend to gives garbage nobody reads instead of NaN


def rotary(positions: Array, dim: int, theta: float) -> tuple[Array, Array]:
    """Cosines and sines of rotary position embedding (RoFormer, 2104.09864), each `[..., dim / 2]` float32."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the two halves of `x` `[..., H, dim]` by the angles of its position."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Causal attention of right-padded rows to themselves.

    Args:
      q: `[... L H d]`, k, v: `[... L K d]` with `H` a multiple of `K`; mask: `[... L]` bool, attended keys.

    Returns:
      `[... L H d]`.
    """
    length, heads, dim = q.shape[-3:]
    q = q.reshape(*q.shape[:-2], k.shape[-2], heads // k.shape[-2], dim)
    seen = jnp.tril(jnp.ones((length, length), bool)) & mask[..., None, :]
    score = jnp.einsum("...tkgd,...ukd->...kgtu", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    weight = jax.nn.softmax(jnp.where(seen[..., None, None, :, :], score, FAR), axis=-1)
    out = jnp.einsum("...kgtu,...ukd->...tkgd", weight.astype(v.dtype), v)
    return out.reshape(*out.shape[:-3], heads, dim)


def shared_prefix(q: Array, prefix: tuple[Array, Array, Array], own: tuple[Array, Array, Array]) -> Array:
    """Attention of `R` responses to their shared prefix and to their own tokens, as one softmax.

    The prefix's keys meet all `R * Q` queries of their context in one matrix product and are never repeated.

    Args:
      q: `[M R Q H d]`.
      prefix: keys and values `[M S K d]`, mask `[M S]` bool.
      own: keys and values `[M R U K d]`, mask broadcastable to `[M R Q U]` bool.

    Returns:
      `[M R Q H d]`.
    """
    pk, pv, pmask = prefix
    ok, ov, omask = own
    m, r, n, heads, dim = q.shape
    kv = pk.shape[-2]
    q = (q * dim**-0.5).astype(q.dtype).reshape(m, r, n, kv, heads // kv, dim)
    far = jnp.einsum("mrqkgd,mskd->mrkgqs", q, pk, preferred_element_type=jnp.float32)
    near = jnp.einsum("mrqkgd,mrukd->mrkgqu", q, ok, preferred_element_type=jnp.float32)
    far = jnp.where(pmask[:, None, None, None, None, :], far, FAR)
    near = jnp.where(omask[:, :, None, None, :, :], near, FAR)
    top = jax.lax.stop_gradient(jnp.maximum(far.max(-1, initial=FAR), near.max(-1))[..., None])
    far, near = jnp.exp(far - top), jnp.exp(near - top)
    total = far.sum(-1) + near.sum(-1)
    out = jnp.einsum("mrkgqs,mskd->mrqkgd", far.astype(pv.dtype), pv, preferred_element_type=jnp.float32)
    out += jnp.einsum("mrkgqu,mrukd->mrqkgd", near.astype(ov.dtype), ov, preferred_element_type=jnp.float32)
    out /= jnp.moveaxis(total, -1, 2)[..., None]
    return out.reshape(m, r, n, heads, dim).astype(pv.dtype)
