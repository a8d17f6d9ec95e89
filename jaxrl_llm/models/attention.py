"""Attention of grouped responses: to the prefix they share, and to themselves."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models import splash
from jaxrl_llm.models.config import RopeScaling

FAR = -1e30  # finite, so that a row with nothing to attend to gives garbage nobody reads instead of NaN


class Rule(NamedTuple):
    """What scores are and which keys a query sees, besides causality. What is None is not in the program.

    scale: queries are multiplied by it; None: `head_dim ** -0.5`.
    cap: `c`, scores are `c tanh(scores / c)` (Gemma 2, 2408.00118).
    window: a query sees the keys less than this many positions before it.
    local: `[]` bool, whether this layer has that window, where layers differ in one program.
    splash: on a TPU, whole sequences attend by its kernel (`models/splash.py`); elsewhere it changes nothing.
    """

    scale: float | None = None
    cap: float | None = None
    window: int | None = None
    local: Array | None = None
    splash: bool = False

    def limits(self, length: int) -> bool:
        """Whether some query of `length` consecutive positions may not see a key that causality shows it."""
        return self.window is not None and length > self.window

    def near(self, distance: Array) -> Array:
        """Which keys that stand `distance` positions before the query are seen."""
        seen: Array = distance < jnp.int32(self.window or 0)
        return seen if self.local is None else seen | ~self.local


PLAIN = Rule()


def rotary(positions: Array, dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Array, Array]:
    """Cosines and sines of rotary position embedding (RoFormer, 2104.09864), each `[..., dim / 2]` float32."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is not None:
        frequency = _slower(frequency, scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the two halves of `x` `[..., H, dim]` by the angles of its position."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _slower(frequency: Array, scaling: RopeScaling) -> Array:
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def causal(q: Array, k: Array, v: Array, mask: Array, rule: Rule = PLAIN) -> Array:
    """Causal attention of right-padded rows to themselves.

    Args:
      q: `[... L H d]`, k, v: `[... L K d]` with `H` a multiple of `K`; mask: `[... L]` bool, attended keys.
      rule: scale, cap and window.

    Returns:
      `[... L H d]`.
    """
    if rule.splash:
        plain = functools.partial(causal, rule=rule._replace(splash=False))
        kernel = functools.partial(splash.causal, scale=rule.scale)
        return _where_there_is_a_tpu(kernel, plain, q, k, v, mask)
    *batch, length, heads, dim = q.shape
    kv, g = k.shape[-2], heads // k.shape[-2]
    q = jnp.moveaxis(_scaled(q, rule).reshape(*batch, length, kv, g, dim), -4, -2)
    order = jnp.tril(jnp.ones((length, length), bool))
    if rule.limits(length):
        order &= rule.near(jnp.arange(length)[:, None] - jnp.arange(length))
    seen = order & mask[..., None, :]
    score = _capped(_product(q.reshape(*batch, kv, g * length, dim), jnp.moveaxis(k, -3, -1)), rule)
    score = jnp.where(seen[..., None, None, :, :], score.reshape(*batch, kv, g, length, length), FAR)
    weight = jax.nn.softmax(score, axis=-1).astype(v.dtype).reshape(*batch, kv, g * length, length)
    out = _product(weight, jnp.swapaxes(v, -3, -2)).astype(v.dtype).reshape(*batch, kv, g, length, dim)
    return jnp.moveaxis(out, -2, -4).reshape(*batch, length, heads, dim)


def _scaled(q: Array, rule: Rule) -> Array:
    return (q * (q.shape[-1] ** -0.5 if rule.scale is None else rule.scale)).astype(q.dtype)


def _capped(score: Array, rule: Rule) -> Array:
    return score if rule.cap is None else rule.cap * jnp.tanh(score / rule.cap)


def shared_prefix(
    q: Array, prefix: tuple[Array, Array, Array], own: tuple[Array, Array, Array], rule: Rule = PLAIN
) -> Array:
    """Attention of `R` responses to their shared prefix and to their own tokens, as one softmax.

    The prefix's keys meet all `R * Q` queries of their context in one matrix product and are never repeated.

    Args:
      q: `[M R Q H d]`.
      prefix: keys and values `[M S K d]`, mask `[M S]` bool, or `[M Q S]` where windows hide keys from some queries.
      own: keys and values `[M R U K d]`, mask broadcastable to `[M R Q U]` bool.
      rule: scale and cap; windows are in the masks.

    Returns:
      `[M R Q H d]`.
    """
    if rule.splash:
        plain = functools.partial(shared_prefix, rule=rule._replace(splash=False))
        return _where_there_is_a_tpu(functools.partial(_by_splash, rule), plain, q, prefix, own)
    pk, pv, pmask = prefix
    ok, ov, omask = own
    m, r, n, heads, dim = q.shape
    kv, s, u = pk.shape[-2], pk.shape[1], ok.shape[2]
    g = heads // kv
    shape = (m, kv, r, g, n)
    q = _scaled(q, rule).reshape(m, r, n, kv, g, dim).transpose(0, 3, 1, 4, 2, 5)
    to_far, to_near = q.reshape(m, kv, r * g * n, dim), q.reshape(m, kv, r, g * n, dim)
    far, near = _product(to_far, pk.transpose(0, 2, 3, 1)), _product(to_near, ok.transpose(0, 3, 1, 4, 2))
    far, near = _capped(far, rule), _capped(near, rule)
    pmask = pmask[:, None] if pmask.ndim == 2 else pmask
    far = jnp.where(pmask[:, None, None, None], far.reshape(*shape, s), FAR)
    near = jnp.where(omask[:, None, :, None], near.reshape(*shape, u), FAR)
    top = jax.lax.stop_gradient(jnp.maximum(far.max(-1, initial=FAR), near.max(-1))[..., None])
    far, near = jnp.exp(far - top), jnp.exp(near - top)
    total = far.sum(-1) + near.sum(-1)
    far, near = far.astype(pv.dtype).reshape(m, kv, r * g * n, s), near.astype(ov.dtype).reshape(m, kv, r, g * n, u)
    out = _product(far, pv.transpose(0, 2, 1, 3)).reshape(*shape, dim)
    out += _product(near, ov.transpose(0, 3, 1, 2, 4)).reshape(*shape, dim)
    out = (out / total[..., None]).astype(pv.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(m, r, n, heads, dim)


def _by_splash(rule: Rule, q: Array, prefix: tuple[Array, Array, Array], own: tuple[Array, Array, Array]) -> Array:
    """The kernel adds causality itself; which keys exist at all is what the last query sees."""
    exists = jnp.broadcast_to(own[2], (*q.shape[:3], own[0].shape[2]))[..., -1, :]
    return splash.shared_prefix(q, prefix, (*own[:2], exists), scale=rule.scale)


def _where_there_is_a_tpu(kernel: Callable[..., Array], plain: Callable[..., Array], *inputs: Any) -> Array:
    """Which of the two is decided where the program is compiled to run, not where it is traced."""
    out: Array = jax.lax.platform_dependent(*inputs, tpu=kernel, default=plain)
    return out


def _product(x: Array, y: Array) -> Array:
    """Batch axes come first and both operands are contiguous: einsums on other layouts take twice as long on a CPU."""
    return jnp.matmul(x, y, preferred_element_type=jnp.float32)


def write(x: Array, new: Array, index: Array, axis: int) -> Array:
    """`x` with the slice `new` (without `axis`, which is negative) at `index` `[]`: an update in place inside a loop.

    Under `vmap` with one `index` for all members it stays one; JAX would make it a scatter, which copies `x`.
    """
    written: Array = _write(axis)(x, new, index)
    return written


@functools.cache
def _write(axis: int) -> Any:
    def plain(x: Array, new: Array, index: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.expand_dims(new, axis), index, x.ndim + axis)

    def batched(size: int, in_batched: list[bool], x: Array, new: Array, index: Array) -> tuple[Array, bool]:
        x, new = (y if b else jnp.broadcast_to(y, (size, *y.shape)) for y, b in zip((x, new), in_batched, strict=False))
        return (jax.vmap(plain)(x, new, index) if in_batched[2] else write(x, new, index, axis)), True

    one_index = jax.custom_batching.custom_vmap(plain)
    one_index.def_vmap(batched)
    return one_index


def one_token(
    q: Array, prefix: tuple[Array, Array, Array], own: tuple[Array, Array, Array], rule: Rule = PLAIN
) -> Array:
    """`shared_prefix` for one query a response, on cached keys that are stored transposed.

    Keys are `[d, tokens]` and values `[tokens, d]`, so that both products run along the last axis of what is read most.

    Args:
      q: `[M R H d]`.
      prefix: keys `[M K d S]`, values `[M K S d]`, mask `[M S]` bool, or `[M R S]` where windows hide keys from some.
      own: keys `[M R K d U]`, values `[M R K U d]`, their leading axes merged in any way; mask broadcastable to
        `[M R U]` bool.
      rule: scale and cap; windows are in the masks.

    Returns:
      `[M R H d]`.
    """
    pk, pv, pmask = prefix
    ok, ov, omask = own
    (m, r, heads, dim), kv, lead = q.shape, pk.shape[1], ok.shape[:-2]
    groups, s, u = heads // kv, pk.shape[-1], ok.shape[-1]
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    q = _scaled(q, rule).reshape(m, r, kv, groups, dim)
    far = product(q.swapaxes(1, 2).reshape(m, kv, r * groups, dim), pk).reshape(m, kv, r, groups, s)
    near = product(q.reshape(*lead, groups, dim), ok).reshape(m, r, kv, groups, u)
    far, near = _capped(far, rule), _capped(near, rule)
    pmask = pmask[:, None] if pmask.ndim == 2 else pmask
    far = jnp.where(pmask[:, None, :, None], far, FAR)
    near = jnp.where(jnp.broadcast_to(omask, (m, r, u))[:, :, None, None, :], near, FAR)
    top = jnp.maximum(far.max(-1, initial=FAR).swapaxes(1, 2), near.max(-1))
    far, near = jnp.exp(far - top.swapaxes(1, 2)[..., None]), jnp.exp(near - top[..., None])
    total = far.sum(-1).swapaxes(1, 2) + near.sum(-1)
    out = product(far.astype(pv.dtype).reshape(m, kv, r * groups, s), pv).reshape(m, kv, r, groups, dim).swapaxes(1, 2)
    out += product(near.astype(ov.dtype).reshape(*lead, groups, u), ov).reshape(m, r, kv, groups, dim)
    return (out / total[..., None]).reshape(m, r, heads, dim).astype(pv.dtype)
