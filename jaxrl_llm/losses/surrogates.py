"""Token losses, minimised: `(ratio, advantage, logp) -> [B G T]`.

`low` and `high` are widths: the bounds are `1 - low` and `1 + high`. The gradient of every one is
`-M * W * A * grad l`; what differs is when the token is silenced (M) and by how much its ratio counts (W).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array


def log_likelihood(ratio: Array, advantage: Array, logp: Array) -> Array:
    """`-A * l` (REINFORCE, Williams 1992): the right gradient on-policy, a value without meaning."""
    return -advantage * logp


def unclipped(ratio: Array, advantage: Array, logp: Array) -> Array:
    """`-A * r` (importance-weighted policy gradient, CPI)."""
    return -advantage * ratio


def clip_min(
    ratio: Array, advantage: Array, logp: Array, *, low: float | Array = 0.2, high: float | Array = 0.2
) -> Array:
    """`-min(A r, A clip(r, 1 - low, 1 + high))` (PPO, 1707.06347, eq. 7).

    No gradient iff `A > 0` and `r > 1 + high`, or `A < 0` and `r < 1 - low`.
    """
    return -jnp.minimum(advantage * ratio, advantage * jnp.clip(ratio, 1 - low, 1 + high))


def dual_clip(
    ratio: Array,
    advantage: Array,
    logp: Array,
    *,
    low: float | Array = 0.2,
    high: float | Array = 0.2,
    bound: float | Array = 3.0,
) -> Array:
    """`clip_min`, and where `A < 0` at most `-A * bound`: no gradient there once `r > bound` (1912.09729, eq. 5).

    `bound` must exceed `1 + high`, or it silences ordinary tokens.
    """
    loss = clip_min(ratio, advantage, logp, low=low, high=high)
    # 0 * inf would be NaN in the branch that is not taken.
    size = jnp.where(advantage < 0, -advantage, 1.0)
    return jnp.where(advantage < 0, jnp.minimum(loss, size * bound), loss)


def clipped_weight(
    ratio: Array, advantage: Array, logp: Array, *, low: float | Array = 1.0, high: float | Array = 4.0
) -> Array:
    """`-sg[clip(r, 1 - low, 1 + high)] * A * l` (CISPO, 2506.13585, eq. 4): no token loses its gradient.

    `low=1` switches the lower bound off.
    """
    return -jax.lax.stop_gradient(jnp.clip(ratio, 1 - low, 1 + high)) * advantage * logp
