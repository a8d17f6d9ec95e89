"""Advantages relative to the other rollouts of the same prompt, written for one group.

A group of one has nothing to be compared with: its advantage is 0. The released code of verl gives it its raw reward
(mean 0, std 1) instead, and TRL a NaN std or 0; `raw_singletons=True` follows verl.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.stats import centered, standardise
from jaxrl_llm.types import Batch, masked


def per_group(fn: Callable[[Array, Array], Array], batch: Batch) -> Array:
    """Maps `fn` over the prompts: `(reward [G], keep [G]) -> [G]`, then each row's credit to its tokens, `[B G T]`."""
    return over_tokens(batch, jax.vmap(fn)(row_reward(batch), batch.rows))


def center(reward: Array, keep: Array, *, raw_singletons: bool = False) -> Array:
    """`R_i - mean(R)`, `[G]` (Dr. GRPO, 2503.20783)."""
    deviation = centered(reward, keep)
    return jnp.where(keep.sum() <= 1, masked(keep, reward), deviation) if raw_singletons else deviation


def center_scale(
    reward: Array, keep: Array, *, ddof: int = 1, eps: float = 1e-6, raw_singletons: bool = False
) -> Array:
    """`(R_i - mean(R)) / (std(R) + eps)`, `[G]` (GRPO, 2402.03300, section 4.1.2); 0 if all are equal.

    The paper does not say which std; `ddof=1` (unbiased) and `eps=1e-6` are verl's, TRL uses 1e-4.
    """
    return standardise(reward, keep, ddof=ddof, eps=eps, raw_singletons=raw_singletons)


def leave_one_out(reward: Array, keep: Array, *, raw_singletons: bool = False) -> Array:
    """`R_i` minus the mean of the *other* rewards, `[G]` (RLOO, 2402.14740).

    Computed as `n / (n - 1) * (R_i - mean(R))`, which does not cancel when rewards are large and close.
    """
    n = keep.sum()
    return center(reward, keep, raw_singletons=raw_singletons) * jnp.where(n > 1, n / jnp.maximum(n - 1, 1), 1.0)
