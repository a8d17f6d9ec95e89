"""PF-PPO: policy filtration for PPO."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.rollouts.rows import along_group, take_rows
from jaxrl_llm.types import Batch, Learn, Metrics, masked, split

Chances = Callable[[Array, Array], Array]


def power(reward: Array, keep: Array, *, exponent: float | Array = 2.0) -> Array:
    """`|R|^p` in units of the largest, `[G]`; equal chances if all rewards are 0."""
    size = jnp.abs(masked(keep, reward))
    largest = size.max()
    return jnp.where(largest > 0, (size / jnp.where(largest > 0, largest, 1.0)) ** exponent, 1.0) * keep


def best_and_worst(reward: Array, keep: Array) -> Array:
    """1 at every row with the highest or the lowest reward, `[G]` (BW)."""
    return (is_best(reward, keep) | is_best(-reward, keep)).astype(jnp.float32)


def best_and_random(reward: Array, keep: Array, *, best: float | Array = 0.4, other: float | Array = 0.1) -> Array:
    """`best` at rows with the highest reward, `other` elsewhere, `[G]` (BR)."""
    return masked(keep, jnp.where(is_best(reward, keep), best, jnp.full(reward.shape, other)))


def best_only(reward: Array, keep: Array) -> Array:
    """1 at rows with the highest reward, `[G]` (BoN): nothing bad is left to learn from."""
    return is_best(reward, keep).astype(jnp.float32)


def is_best(reward: Array, keep: Array) -> Array:
    """`[G]` bool: the rows with the highest reward among those that count."""
    return keep & (reward == jnp.max(reward, where=keep, initial=-jnp.inf))


def drawn_rows(key: Array, chance: Array, keep: Array) -> Array:
    """`[B G]` int: a row for the place of each row that counts, with replacement; the other rows keep theirs."""
    drawn = jax.random.categorical(key, jnp.log(chance)[:, None], shape=keep.shape)
    return jnp.where(keep, drawn, jnp.arange(keep.shape[-1]))


def of_rows(batch: Batch, rows: Array) -> Batch:
    """The batch as if `rows [B G]` had been sampled: all that is known of a row goes with it."""
    per_row = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("rollouts", "step", "prepared")}
    return replace(batch, rollouts=take_rows(batch.rollouts, rows), **along_group(per_row, rows))


def resampled(
    key: Array, models: Any, batch: Batch, learn: Learn, *, chances: Chances, then: Any
) -> tuple[Any, Metrics]:
    """`then` on groups whose rows were drawn by their chances, as many as there were; credit is that of before."""
    keys = split(key, "draw", "then")
    chance = jax.vmap(chances)(batch.outcome, batch.rows)
    updated: tuple[Any, Metrics] = then(
        keys["then"], models, of_rows(batch, drawn_rows(keys["draw"], chance, batch.rows)), learn
    )
    return updated


def pf_ppo(
    *, group_size: int = 5, kl: float | None = 0.01, epochs: int = 4, chances: Chances = best_and_random
) -> Algorithm:
    """`ppo` on samples drawn again by the rank of their reward, which reward models get right at the ends only.

    Source: "Policy Filtration in RLHF to Fine-Tune LLM for Code Generation", 2409.06957. With `power` as verl's
      `use_pf_ppo`.
    Deviations: rows are drawn within a prompt, as in the paper (verl: over the batch), after the advantages, as in
      verl. The rank is that of the verifier's outcome. The choice of `chances` by how well they keep the reward's
      correlation with the truth is left to the user.
    Limit: with one response a prompt it is `ppo`.
    Family: sampling and curricula.

    Args:
      group_size: responses a prompt; 5 in the paper.
      kl: weight of `log(pi / pi_ref)` in each token's reward.
      epochs: passes over a batch.  # not in the paper
      chances: `(reward [G], keep [G]) -> [G]`, in proportion: `best_and_random`, `best_and_worst`, `power`,
        `best_only`.
    """
    parent = ppo(group_size=group_size, kl=kl, epochs=epochs)
    return replace(parent, update=partial(resampled, chances=chances, then=parent.update))
