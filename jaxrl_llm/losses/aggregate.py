"""Aggregations: from a mask to every token's share of the loss.

`loss = sum(share * token_loss)`. Shares are computed once over the whole optimiser step, so the loss and its gradient
are the same for every split into micro-batches, accumulation steps or devices. A row without tokens has no share.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def token_mean(mask: Array) -> Array:
    """`m / N`: every token of the step counts the same (DAPO, 2503.14476, section 3.3, over the batch).

    Args:
      mask: `[B G T]` bool.

    Returns:
      `[B G T]` float32; all 0 if no token counts.
    """
    m = mask.astype(jnp.float32)
    return m / jnp.maximum(m.sum(), 1)


def group_mean_token_mean(mask: Array) -> Array:
    """`m / (N_g * groups)`: every group with tokens counts the same, its tokens equally (CISPO, 2506.13585, eq. 4)."""
    m = mask.astype(jnp.float32)
    tokens = m.sum((-2, -1), keepdims=True)
    return m / (jnp.maximum(tokens, 1) * jnp.maximum((tokens > 0).sum(), 1))


def sequence_mean_token_mean(mask: Array) -> Array:
    """`m / (L_i * rows)`: every row with tokens counts the same (GRPO, 2402.03300, eq. 3)."""
    m = mask.astype(jnp.float32)
    lengths = m.sum(-1, keepdims=True)
    return m / (jnp.maximum(lengths, 1) * jnp.maximum((lengths > 0).sum(), 1))


def sequence_mean_token_sum(mask: Array) -> Array:
    """`m / rows`: the mean over rows with tokens of the sum over tokens (REINFORCE on the sequence log-prob)."""
    m = mask.astype(jnp.float32)
    return m / jnp.maximum((m.sum(-1) > 0).sum(), 1)


def token_sum_over(mask: Array, *, constant: int | float | None = None) -> Array:
    """`m / (rows * C)`: a token's gradient does not depend on its row's length (Dr. GRPO, 2503.20783).

    Args:
      mask: `[B G T]` bool.
      constant: `C` in tokens; the padded length `T`, which is the generation budget, if None.
    """
    m = mask.astype(jnp.float32)
    constant = mask.shape[-1] if constant is None else constant
    return m / (jnp.maximum((m.sum(-1) > 0).sum(), 1) * constant)


def pair_mean(mask: Array) -> Array:
    """Every group with at least two rows counts the same: its shares sum to 1 / pairs."""
    m = mask.astype(jnp.float32)
    pair = mask.any(-1).sum(-1)[:, None, None] > 1
    return jnp.where(pair, m / jnp.maximum(m.sum((-2, -1), keepdims=True), 1), 0.0) / jnp.maximum(pair.sum(), 1)
