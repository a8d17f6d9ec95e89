"""Pass@k training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.scipy.special import gammaln

from jaxrl_llm.advantages.group import per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.types import masked
from jaxrl_llm.updates.passes import several_passes


def all_from(some: Array, every: Array, k: int) -> Array:
    """`C(some, k) / C(every, k)`: the chance that `k` draws without return all come from `some` of `every`."""
    possible = some >= k
    n, m = jnp.where(possible, some, k).astype(jnp.float32), jnp.maximum(every, k).astype(jnp.float32)
    log = gammaln(n + 1) - gammaln(n - k + 1) - gammaln(m + 1) + gammaln(m - k + 1)
    return jnp.where(possible, jnp.exp(log), 0.0)


def pass_at_k(
    reward: Array, keep: Array, *, k: int, threshold: float | Array = 0.5, eps: float | Array = 1e-6
) -> Array:
    """The analytic advantage of a group, `[G]`: of a sample in a random set of `k` that is paid if any is right."""
    right = keep & (reward > threshold)
    size, wrong = keep.sum(), (keep & ~right).sum()
    failed = all_from(wrong, size, k)
    # (a, b) drawn all wrong: C(wrong - 1, k - 1) / C(size - 1, k - 1).
    failed_with = all_from(wrong - 1, size - 1, k - 1)
    spread = jnp.sqrt(jnp.maximum(failed * (1 - failed), 0.0))
    mixed = (wrong >= k) & (wrong < size)
    return masked(keep & mixed, jnp.where(right, failed, failed - failed_with) / (spread + eps))


def passk(*, group_size: int = 8, k: int = 4, minibatches: int = 1) -> Algorithm:
    """The loss of `dapo`, paid for the chance that at least one of `k` samples is right, in closed form.

    Rewards of single samples close a prompt once one way works; those of sets keep looking for others.

    Source: "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models",
      2508.10751, analytical derivation.
    Deviations: a reward above 0.5 is right. Neither DAPO's dynamic sampling nor its length punishment takes part.
    Limit: with k=1 it is `grpo` with the population's deviation, kl=None and the loss of `dapo`.
    Family: rewards and budgets.

    Args:
      group_size: samples a prompt.
      k: size of a set; 4 and 8 in the paper.
      minibatches: optimiser steps a batch.  # not in the paper

    Raises:
      ValueError: a set larger than the group.
    """
    if not 1 <= k <= group_size:
        raise ValueError(f"passk draws sets of k from a group: k must be 1 to group_size={group_size}, got {k}")
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=partial(per_group, partial(pass_at_k, k=k)),
        loss=dapo().loss,
        update=partial(several_passes, minibatches=minibatches),
    )
