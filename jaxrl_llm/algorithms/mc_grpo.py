"""MC-GRPO: median-centred advantages for small groups."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.advantages.group import per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.types import Batch, masked
from jaxrl_llm.updates.passes import several_passes


def median(x: Array, keep: Array) -> Array:
    """The lower median of `x` `[G]` where `keep`; 0 if there is nothing."""
    order = jnp.sort(jnp.where(keep, x, jnp.inf))
    middle = order[jnp.maximum(keep.sum() - 1, 0) // 2]
    return jnp.where(keep.any(), middle, 0.0)


def center_median_scale(reward: Array, keep: Array, *, eps: float | Array = 1e-3) -> Array:
    """`(R_i - median) / (MAD + eps)`, `[G]`, MAD the median absolute deviation; divided by 1 where that is 0."""
    deviation = masked(keep, reward - median(reward, keep))
    spread = median(jnp.abs(deviation), keep)
    return deviation / jnp.where(spread > 0, spread + eps, 1.0)


def is_pivot(reward: Array, keep: Array) -> Array:
    """`[G]` bool: the first row that is the median."""
    at = keep & (reward == median(reward, keep))
    return at & (jnp.cumsum(at) == 1)


def not_pivot(batch: Batch) -> Array:
    """`[B G]` bool: every row but its group's pivot."""
    return ~jax.vmap(is_pivot)(row_reward(batch), batch.rows)


def mc_grpo(
    *, group_size: int = 8, clip: float = 0.2, kl: float | None = 0.04, eps: float = 1e-3, epochs: int = 2
) -> Algorithm:
    """`grpo` centred by the median of one rollout more, which carries no gradient and leaves the loss.

    With few rollouts a mean baseline gives many of them an advantage of the wrong sign.

    Source: "MC-GRPO: Median-Centered Group Relative Policy Optimization", 2601.22582, and its released code.
    Deviations: where the median absolute deviation is 0 (binary rewards with a majority) deviations are divided by 1;
      the released code divides by eps, which makes advantages of 1000. Its script for GSM8K also scales a group up by
      `(G + 1) / rows with an advantage`, which is left out. Where rows do not count and their number is even, the
      median is the lower of the two in the middle.
    Limit: with `per_group(center_scale)` and all rows in the loss it is `grpo` of one rollout more, `epochs` times.
    Family: credit.

    Args:
      group_size: rows with a gradient, even: 2, 4 and 8 in the paper; one more is sampled.
      clip: both widths.  # not in the paper
      kl: weight of the divergence in the loss.
      eps: added to the median absolute deviation.
      epochs: passes over a batch.

    Raises:
      ValueError: an odd group size, which has no single middle row with the pivot.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"mc_grpo adds one pivot rollout: group_size must be even and at least 2, got {group_size}")
    return replace(
        grpo(group_size=group_size + 1, clip=clip, kl=kl),
        advantage=partial(per_group, partial(center_median_scale, eps=eps)),
        weight=not_pivot,
        update=partial(several_passes, epochs=epochs),
    )
