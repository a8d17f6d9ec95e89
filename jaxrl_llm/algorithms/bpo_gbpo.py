"""GBPO: bounded policy optimisation on groups."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.stats import masked_var
from jaxrl_llm.types import Batch, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def median(x: Array, keep: Array) -> Array:
    """Of `x` `[G]` where `keep`, `[]`: the mean of the two middle values if their number is even; 0 of nothing."""
    ordered, n = jnp.sort(jnp.where(keep, x, jnp.inf)), keep.sum()
    middle = (ordered[jnp.maximum(n - 1, 0) // 2] + ordered[jnp.minimum(n // 2, x.size - 1)]) / 2
    return masked(n > 0, middle)


def from_median(reward: Array, keep: Array, *, eps: float | Array = 1e-6) -> Array:
    """`(R_i - median(R)) / (std(R) + eps)`, `[G]`, 0 where not kept."""
    std = jnp.sqrt(masked_var(reward, keep))
    return masked(keep, (reward - median(reward, keep)) / (std + eps))


def best_move(
    scores: Scores, batch: Batch, *, low: float | Array, high: float | Array, temperature: float | Array
) -> dict[str, Array]:
    """`{"move": (low + high) * sigmoid(A~ / temperature) - low}`, `[B G 1]`: the optimal policy's ratio, minus 1.

    `A~` is `from_median`: the optimum is balanced around the median, not the mean.
    """
    advantage = jax.vmap(from_median)(row_reward(batch), batch.rows)
    return {"move": ((low + high) * jax.nn.sigmoid(advantage / temperature) - low)[..., None]}


def distance(ratio: Array, advantage: Array, logp: Array, *, move: Array, tolerance: float | Array = 1e-4) -> Array:
    """`|A| * |r - 1 - move|`: outside the bounds the gradient pulls back. 0, without gradient, within the tolerance."""
    off = jnp.abs(ratio - 1 - move)
    # Without it the sign of a rounding error would be a gradient wherever the old policy is the target already.
    return jnp.abs(advantage) * masked(off > tolerance, off)


def bpo_gbpo(
    *,
    group_size: int = 8,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    temperature: float = 1e-4,
    kl: float | None = 0.001,
    epochs: int = 5,
) -> Algorithm:
    """`grpo` without a clip: the ratio is regressed on that of the best policy whose ratio is bounded.

    That policy is known in closed form, and where the bounds act the loss pulls the ratio back instead of falling
    silent.

    Source: "Bounded Ratio Reinforcement Learning", 2604.18578 (GBPO); settings of the released scripts for MATH.
    Deviations: BPO itself, with a critic for the mean and one for the median, is not here. A group of one has no loss.
      The scripts take one prompt an optimiser step; here a step is the whole batch. A ratio within 1e-4 of its target
      has no gradient.
    Limit: inside the bounds, with temperature near 0 and no reward from a group's median to its mean, its gradient is
      that of `grpo` with `token_mean`. A reward that is the median has the target ratio 1 at any temperature.
    Family: objective and clipping.

    Args:
      group_size: 32 in the paper.  # 8: not in the paper
      clip_low: the target ratio is above `1 - clip_low`; both are 0.3 for AIME and AMC.
      clip_high: and below `1 + clip_high`.
      temperature: of the target, above 0; 1e-4 makes it one bound or the other.
      kl: weight of the divergence in the loss; None or 0 drops the reference.  # that of verl, which the scripts leave
      epochs: passes over a batch; 10 for AIME and AMC.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        loss=PolicyLoss(
            ratio=partial(token_ratio, old=recomputed),
            surrogate=distance,
            aggregate=token_mean,
            terms=optional(kl_to_reference, weight=kl),
            prepare=partial(best_move, low=clip_low, high=clip_high, temperature=temperature),
        ),
        update=partial(several_passes, epochs=epochs),
    )
