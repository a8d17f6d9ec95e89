"""ADORA: adaptive online rollout weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.types import Batch

Pattern = Callable[[Array, Array, Array, Array], Array]


def longest_right(length: Array, right: Array) -> Array:
    """Tokens of the longest right row `[]`; -inf without one."""
    return jnp.max(length, where=right, initial=-jnp.inf)


def mean_wrong(length: Array, wrong: Array, without: float) -> Array:
    """Mean tokens of the wrong rows `[]`; `without` if there are none."""
    return jnp.where(wrong.any(), jnp.sum(length, where=wrong) / jnp.maximum(wrong.sum(), 1), without)


def right_outgrow_wrong(length: Array, right: Array, truncated: Array, keep: Array) -> Array:
    """`[]` bool: the longest right row is longer than wrong rows are on average (the language-model preset).

    Truncated wrong rows are not looked at. Without right rows it is False, without wrong ones True.
    """
    wrong = keep & ~right & ~truncated
    return longest_right(length, keep & right) > mean_wrong(length, wrong, -jnp.inf)


def right_outgrow_wrong_or_none(length: Array, right: Array, truncated: Array, keep: Array) -> Array:
    """The same in mixed groups (the vision-language preset); True without right rows, False without wrong ones."""
    wrong = keep & ~right & ~truncated
    some = (keep & right).any()
    return ~some | (longest_right(length, keep & right) > mean_wrong(length, wrong, jnp.inf))


def one_if_shown(batch: Batch, *, pattern: Pattern, shrink: float | Array, threshold: float | Array = 0.5) -> Array:
    """`[B G]`: 1 in groups that show the pattern, `shrink` in the others."""
    length = batch.rollouts.lengths.astype(jnp.float32)
    shown = jax.vmap(pattern)(length, batch.outcome > threshold, batch.rollouts.truncated, batch.rows)
    return jnp.broadcast_to(jnp.where(shown, 1.0, shrink)[:, None], batch.outcome.shape)


def adora(
    *,
    group_size: int = 16,
    clip: float = 0.2,
    kl: float | None = 0.001,
    shrink: float = 0.1,
    pattern: Pattern = right_outgrow_wrong,
) -> Algorithm:
    """`grpo` that makes less of groups whose rollouts do not show a wanted pattern: right answers that think longer.

    Source: "ADORA: Training Reasoning Models with Dynamic Advantage Estimation on Reinforcement Learning" (technical
      report and released code, ShadeCloak/ADORA, 2025).
    Deviations: a wrong row is left out where it is truncated, not beyond a fixed number of tokens near the limit.
    Limit: with shrink=1 it is `grpo` with this clip and kl.
    Family: credit.

    Args:
      group_size: 16 in the released scripts.
      clip: both widths.
      kl: weight of the divergence in the loss.
      shrink: lambda, what the advantages of other groups are multiplied by.
      pattern: `(length [G], right [G], truncated [G], keep [G]) -> []` bool of one group.
    """
    return replace(
        grpo(group_size=group_size, clip=clip, kl=kl), weight=partial(one_if_shown, pattern=pattern, shrink=shrink)
    )
