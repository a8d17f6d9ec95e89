"""AsymRE: asymmetric REINFORCE."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import log_likelihood
from jaxrl_llm.types import masked


def shifted_center(reward: Array, keep: Array, *, shift: float | Array = -0.1) -> Array:
    """`R_i - (mean(R) + shift)`, `[G]`; 0 in a group of one."""
    return masked(keep & (keep.sum() > 1), center(reward, keep) - jnp.asarray(shift))


def asymre(*, group_size: int = 8, shift: float = -0.1) -> Algorithm:
    """`reinforce` with a baseline below the group's mean: off-policy it is safer to trust good answers than bad ones.

    Source: "Asymmetric REINFORCE for off-Policy Reinforcement Learning", 2506.20520; form and settings of
      "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm", 2509.24203, and Trinity-RFT's `asymre`.
    Deviations: a group of one has advantage 0 (the released code: its reward, without shift).
    Limit: with shift=0 it is REINFORCE with the group's mean as baseline and `token_mean`.
    Family: credit.

    Args:
      group_size: 8 in 2509.24203.
      shift: of the baseline, below 0.
    """
    return replace(
        reinforce(group_size=group_size),
        advantage=partial(per_group, partial(shifted_center, shift=shift)),
        loss=PolicyLoss(surrogate=log_likelihood, aggregate=token_mean),
    )
