"""REINFORCE with a gate and a weight: `-A * sg[w * g] * l`, which all clipped losses are in gradient.

A gate says which tokens have a gradient, a weight how much of it. Both are functions of (ratio, advantage), and see
the ratio of the loss: a sequence's, if it uses one.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import masked

Gate = Callable[..., Array]
Weight = Callable[[Array, Array], Array]
Width = float | Array


def open_gate(ratio: Array, advantage: Array, *, low: Width = 0.2, high: Width = 0.2) -> Array:
    """Every token, whatever the widths."""
    return jnp.ones(ratio.shape, bool)


def two_sided(ratio: Array, advantage: Array, *, low: Width = 0.2, high: Width = 0.2) -> Array:
    """`1 - low <= r <= 1 + high`."""
    return (ratio >= 1 - low) & (ratio <= 1 + high)


def one_sided(ratio: Array, advantage: Array, *, low: Width = 0.2, high: Width = 0.2) -> Array:
    """PPO's: a token is gated only where its gradient would take it further from the old policy."""
    return ((advantage >= 0) & (ratio <= 1 + high)) | ((advantage <= 0) & (ratio >= 1 - low))


def ring(
    ratio: Array,
    advantage: Array,
    *,
    low: Width = 0.2,
    high: Width = 0.2,
    outer_low: Width = 0.6,
    outer_high: Width = 2.0,
) -> Array:
    """`two_sided`, and tokens far outside (by the outer widths) that their gradient takes back."""
    back = ((advantage >= 0) & (ratio <= 1 - outer_low)) | ((advantage <= 0) & (ratio >= 1 + outer_high))
    return two_sided(ratio, advantage, low=low, high=high) | back


def unweighted(ratio: Array, advantage: Array) -> Array:
    """1."""
    return jnp.ones_like(ratio)


def importance(ratio: Array, advantage: Array) -> Array:
    """`r`."""
    return ratio


def clipped_importance(ratio: Array, advantage: Array, *, low: Width = 0.6, high: Width = 2.0) -> Array:
    """`clip(r, 1 - low, 1 + high)`."""
    return jnp.clip(ratio, 1 - low, 1 + high)


def exponential(ratio: Array, advantage: Array, *, temperature: Width = 1.0) -> Array:
    """`exp(A / temperature)`: good tokens weigh more than bad ones."""
    return jnp.exp(advantage / temperature)


def gated(ratio: Array, advantage: Array, logp: Array, *, gate: Gate, weight: Weight = unweighted) -> Array:
    """`-A * sg[w] * l` where the gate is open, 0 elsewhere."""
    factor = jax.lax.stop_gradient(masked(gate(ratio, advantage), weight(ratio, advantage)))
    return -advantage * factor * logp
