"""OPMD: online policy mirror descent, on groups."""

from __future__ import annotations

from collections.abc import Callable
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

Credit = Callable[..., Array]


def minus_mean(reward: Array, keep: Array, *, temperature: float | Array) -> Array:
    """`R_i - mean(R)`, `[G]`, at every temperature."""
    return center(reward, keep)


def minus_log_mean_exp(reward: Array, keep: Array, *, temperature: float | Array) -> Array:
    """`R_i - tau * log(mean(exp(R / tau)))`, `[G]`: the baseline of the optimal regularised policy."""
    best = jnp.max(reward, where=keep, initial=-jnp.inf)
    # Relative to the best reward: nothing overflows, and equal rewards give exactly 0.
    below = masked(keep, reward - best)
    mean = masked(keep, jnp.exp(below / temperature)).sum() / jnp.maximum(keep.sum(), 1)
    return masked(keep, below - temperature * jnp.log(jnp.where(keep.any(), mean, 1.0)))


def tempered_likelihood(ratio: Array, advantage: Array, logp: Array, *, temperature: float | Array = 1.0) -> Array:
    """`-A * l / (1 + tau)`."""
    return log_likelihood(ratio, advantage, logp) / (1 + temperature)


def opmd(*, group_size: int = 8, temperature: float = 1.0, credit: Credit = minus_mean) -> Algorithm:
    """`reinforce` with a group's baseline, its step shortened by the temperature of a divergence from the old policy.

    Source: "Group-Relative REINFORCE Is Secretly an Off-Policy Algorithm", 2509.24203; Trinity-RFT's `opmd`.
    Deviations: a group of one has advantage 0 (the released code: its reward).
    Limit: with temperature near 0 it is REINFORCE with the group's mean as baseline and `token_mean`.
    Family: objective and clipping.

    Args:
      group_size: 8 in the paper.
      temperature: tau, above 0.
      credit: `minus_mean` or `minus_log_mean_exp`.
    """
    return replace(
        reinforce(group_size=group_size),
        advantage=partial(per_group, partial(credit, temperature=temperature)),
        loss=PolicyLoss(surrogate=partial(tempered_likelihood, temperature=temperature), aggregate=token_mean),
    )
