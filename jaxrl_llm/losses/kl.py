"""Divergence from the reference: estimators of a token's KL, and the loss term made of them.

With `d = l - l_ref` of the sampled token. What an estimator is good for depends on where it stands. As a *value* k1 and
k3 are unbiased (Schulman 2020, "Approximating KL divergence"). As an on-policy *loss* k1 has zero expected gradient, k2
has that of the reverse KL, and k3 roughly that of the forward KL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Scores, masked

Estimator = Callable[[Array], Array]


def k1(d: Array) -> Array:
    """`d`. For rewards; not a loss."""
    return d


def k2(d: Array) -> Array:
    """`d^2 / 2`, gradient `d`: that of the reverse KL, on-policy."""
    return jnp.square(d) / 2


def k3(d: Array) -> Array:
    """`exp(-d) + d - 1`, gradient `1 - exp(-d)` (GRPO, 2402.03300, eq. 4)."""
    return jnp.exp(-d) + d - 1


def k1_straight_through(d: Array) -> Array:
    """The value of k1, the gradient of k2."""
    return k2(d) + jax.lax.stop_gradient(k1(d) - k2(d))


def k3_straight_through(d: Array) -> Array:
    """The value of k3, the gradient of k2."""
    return k2(d) + jax.lax.stop_gradient(k3(d) - k2(d))


def as_loss(estimator: Estimator) -> Estimator:
    """The estimator, if it can be a loss.

    Raises:
      ValueError: it is k1.
    """
    function = estimator
    while isinstance(function, functools.partial):
        function = function.func
    if function is k1:
        raise ValueError(
            "k1 cannot be a loss: on-policy its expected gradient is exactly 0, so it would do nothing but add noise. "
            "Use k2 (reverse-KL gradient), k3, or k1_straight_through; or put k1 into the reward with kl_in_reward"
        )
    return estimator


def kl_to_reference(
    scores: Scores,
    batch: Batch,
    *,
    weight: float | Array,
    estimator: Estimator = k3,
    ratio: Callable[[Scores, Batch], Array] | None = None,
) -> Array:
    """`weight * estimator(l - l_ref)`, `[B G T]`. The difference is clamped to +-20, beyond which it has no gradient.

    Args:
      scores: of the current policy.
      batch: with the reference's scores.
      weight: beta.
      estimator: of the token's KL.
      ratio: multiplies the estimate, gradient included, which makes it unbiased off-policy and k1 a proper loss
        (DeepSeek-V3.2, 2512.02556); nothing if None.

    Raises:
      ValueError: `estimator` is k1 without a ratio, or a log-prob was not computed.
    """
    if ratio is None:
        as_loss(estimator)
    if batch.reference is None or batch.reference.logp is None or scores.logp is None:
        raise ValueError("kl_to_reference needs scores.logp and batch.reference.logp: train with a reference")
    difference = masked(batch.mask, scores.logp - jax.lax.stop_gradient(batch.reference.logp))
    divergence = estimator(jnp.clip(difference, -20.0, 20.0))
    return weight * masked(batch.mask, divergence if ratio is None else ratio(scores, batch) * divergence)
