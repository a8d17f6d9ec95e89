"""Experts: gated MLPs of which each token goes through a few. No token is dropped, whatever the others chose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Experts(nn.Module):
    """A gated MLP for each expert; parameters `gate_proj`, `up_proj` `[E D F]` and `down_proj` `[E F D]`.

    num_experts: `E`.
    width: `F`.
    act: of the gate.
    implementation: "dense" or "ragged", see `dense` and `ragged`.
    dtype: of the computation.
    """

    num_experts: int
    width: int
    act: Callable[[Array], Array]
    implementation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array) -> Array:
        """`x` `[... D]`, the `weights` and indices `chosen` of each token's experts `[... k]` -> `[... D]`."""
        d, k = x.shape[-1], chosen.shape[-1]
        wide, shape = (self.num_experts, d, self.width), (self.num_experts, self.width, d)
        start = nn.initializers.lecun_normal(batch_axis=(0,))
        names = {"gate_proj": wide, "up_proj": wide, "down_proj": shape}
        kernels = [jnp.asarray(self.param(n, start, s, jnp.float32), self.dtype) for n, s in names.items()]
        run = ragged if self.implementation == "ragged" else dense
        rows = x.reshape(-1, d).astype(self.dtype)
        return run(self.act, kernels, rows, weights.reshape(-1, k), chosen.reshape(-1, k)).reshape(x.shape)


def dense(act: Callable[[Array], Array], kernels: list[Array], x: Array, weights: Array, chosen: Array) -> Array:
    """Every expert computes every token, with weight 0 where it was not chosen: `E / k` times the arithmetic.

    Plain matrix products: they shard over experts, and differentiate and vectorise in every way.

    Args:
      act: of the gate.
      kernels: `[E D F]`, `[E D F]`, `[E F D]`.
      x: `[N D]`.
      weights, chosen: `[N k]`.

    Returns:
      `[N D]`.
    """
    gate, up, down = kernels
    share = jnp.einsum("nk,nke->en", weights, jax.nn.one_hot(chosen, gate.shape[0], dtype=weights.dtype))
    inner = act(jnp.einsum("nd,edf->enf", x, gate)) * jnp.einsum("nd,edf->enf", x, up)
    return jnp.einsum("enf,efd->nd", inner * share[..., None].astype(inner.dtype), down)


def ragged(act: Callable[[Array], Array], kernels: list[Array], x: Array, weights: Array, chosen: Array) -> Array:
    """As `dense`, but each expert multiplies its own tokens only, sorted by expert (MegaBlocks, 2211.15841).

    `jax.lax.ragged_dot` is one kernel on a TPU; elsewhere XLA makes it dense, which costs more than `dense` does. JAX
    has no `vmap` of its gradient.
    """
    gate, up, down = kernels
    order = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=gate.shape[0]).astype(jnp.int32)
    rows = x[order // chosen.shape[-1]]
    inner = act(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    out = jax.lax.ragged_dot(inner, down, sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    return jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))


def routed(logits: Array, k: int, *, norm: bool) -> tuple[Array, Array]:
    """Weights float32 and indices of the `k` experts a token goes to, each `[... k]`.

    Args:
      logits: the router's, `[... E]`.
      k: experts a token.
      norm: whether the weights sum to 1, else they are the router's probabilities.
    """
    share = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, chosen = jax.lax.top_k(share, k)
    return weights / weights.sum(-1, keepdims=True) if norm else weights, chosen
