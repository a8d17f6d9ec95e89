"""Experts: gated MLPs of which each token goes through a few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Experts(nn.Module):
    """A gated MLP for each expert; parameters `gate_proj`, `up_proj` `[E D F]` and `down_proj` `[E F D]`.

    No token is dropped: tokens are sorted by expert, and each expert multiplies its own rows (a ragged product, as in
    MegaBlocks, 2211.15841).

    num_experts: `E`.
    width: `F`.
    act: of the gate.
    dtype: of the computation.
    """

    num_experts: int
    width: int
    act: Callable[[Array], Array]
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, weights: Array, chosen: Array) -> Array:
        """`x` `[... D]`, the `weights` and indices `chosen` of each token's experts `[... k]` -> `[... D]`."""
        d, k = x.shape[-1], chosen.shape[-1]
        rows, expert = x.reshape(-1, d), chosen.reshape(-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=self.num_experts).astype(jnp.int32)
        rows = rows[order // k].astype(self.dtype)
        gate = jax.lax.ragged_dot(rows, self._kernels("gate_proj", d, self.width), sizes)
        up = jax.lax.ragged_dot(rows, self._kernels("up_proj", d, self.width), sizes)
        rows = jax.lax.ragged_dot(self.act(gate) * up, self._kernels("down_proj", self.width, d), sizes)
        out = rows[jnp.argsort(order)].reshape(-1, k, d)
        return jnp.einsum("nkd,nk->nd", out, weights.reshape(-1, k).astype(out.dtype)).reshape(x.shape)

    def _kernels(self, name: str, inner: int, outer: int) -> Array:
        start = nn.initializers.lecun_normal(batch_axis=(0,))
        return jnp.asarray(self.param(name, start, (self.num_experts, inner, outer), jnp.float32), self.dtype)


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
