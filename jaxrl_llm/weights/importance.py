"""Corrections for a sampler whose log-probs differ from the trainer's: multipliers, which leave the denominator alone.

`rho = exp(l_old - l_behaviour)`, of the trainer's policy before the update to the sampler's. Tokens the policy did not
choose weigh 1.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import POLICY, Batch, masked

Level = Callable[[Array, Array], Array]


def per_token(log_rho: Array, mask: Array) -> Array:
    """Each token's own, `[B G T]`."""
    return log_rho


def per_sequence(log_rho: Array, mask: Array) -> Array:
    """The product of the row's ratios, `[B G T]`."""
    return jnp.broadcast_to(log_rho.sum(-1, keepdims=True), mask.shape)


def per_sequence_geometric(log_rho: Array, mask: Array) -> Array:
    """The geometric mean of the row's ratios, `[B G T]`."""
    return jnp.broadcast_to(log_rho.sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1), mask.shape)


def truncated_importance(batch: Batch, *, bound: float = 2.0, level: Level = per_token) -> Array:
    """`min(rho, bound)`, `[B G T]` (truncated importance sampling, TIS, Yao et al. 2025).

    Raises:
      ValueError: the old log-probs were not recomputed.
    """
    return jnp.minimum(_rho(batch, level), bound)


def masked_importance(batch: Batch, *, low: float = 0.5, high: float = 2.0, level: Level = per_token) -> Array:
    """`rho` where `low <= rho <= high`, else 0, `[B G T]` (IcePop, MIS 2025).

    The bounds are on `rho` itself; verl compares `-log rho`, so its bounds are on `1 / rho`.

    Raises:
      ValueError: the old log-probs were not recomputed.
    """
    rho = _rho(batch, level)
    return masked((rho >= low) & (rho <= high), rho)


def _rho(batch: Batch, level: Level) -> Array:
    if batch.old is None or batch.old.logp is None:
        raise ValueError("an importance weight needs batch.old.logp (the engine adds it for recipes that read it)")
    chosen = batch.mask & (batch.rollouts.role == POLICY)
    log_rho = masked(chosen, batch.old.logp - batch.rollouts.logp)
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(level(log_rho, chosen), -20.0, 20.0)))
