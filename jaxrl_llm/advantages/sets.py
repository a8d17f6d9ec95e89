"""Credit of sets of responses: what is right and varied together (polychromic objectives, 2509.25424)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.advantages.gae import gae
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Memory, Rollouts, masked


def same_tokens(rollouts: Rollouts) -> Array:
    """`[B G G]` bool: pairs of rows that are the same text."""
    written = jnp.where(rollouts.attended, rollouts.tokens, -1)
    return (written[:, :, None] == written[:, None, :]).all(-1)


def set_credit(reward: Array, alike: Array, keep: Array, sets: Array) -> Array:
    """The mean over the sets that hold a row of `f(set) - mean f`, `[N]`; 0 for rows in no set.

    `f` is the mean reward of a set times the share of its members that are different. Sets that hold a row which does
    not count are left out.

    Args:
      reward: `[N]`.
      alike: `[N N]` bool.
      keep: `[N]` bool.
      sets: `[M n]` int, rows.
    """
    pairs = alike[sets[:, :, None], sets[:, None, :]]  # [M n n]
    first = ~jnp.tril(pairs, k=-1).any(-1)
    counts = keep[sets].all(-1)
    objective = masked(keep, reward)[sets].mean(-1) * first.mean(-1)
    above = masked(counts, objective - masked_mean(objective, counts))
    holds = (sets[..., None] == jnp.arange(reward.size)).any(1) & counts[:, None]  # [M N]
    return masked(holds, jnp.broadcast_to(above[:, None], holds.shape)).sum(0) / jnp.maximum(holds.sum(0), 1)


def in_window(mask: Array, window: int | None) -> Array:
    """`[... T]` bool: the first `window` tokens of `mask`; all if None."""
    return mask if window is None else mask & (jnp.cumsum(mask, -1) <= window)


def set_advantage(
    memory: Memory,
    key: Array,
    batch: Batch,
    *,
    vines: int,
    sets: int,
    members: int,
    window: int | None,
    gamma: float,
    lam: float,
    alike: Callable[[Rollouts], Array],
) -> tuple[Array, Memory]:
    """`set_credit` of random sets at the first `window` tokens of the vines' rows, `gae` elsewhere, `[B G T]`."""
    credit = gae(batch, gamma=gamma, lam=lam)
    if batch.rollouts.segment is None:
        return credit, memory
    b, rows = credit.shape[0], credit.shape[1] - 1
    shape = (b, vines, rows // vines)
    draws = jax.random.uniform(key, (b, vines, sets, rows // vines))
    _, chosen = jax.lax.top_k(draws, members)
    reward, keep = (x[:, 1:].reshape(shape) for x in (row_reward(batch), batch.rows))
    pairs = alike(batch.rollouts)[:, 1:, 1:].reshape(*shape, *shape[1:])
    pairs = jnp.moveaxis(jnp.diagonal(pairs, axis1=1, axis2=3), -1, 1)  # [B vines N N]
    found = jax.vmap(jax.vmap(set_credit))(reward, pairs, keep, chosen).reshape(b, rows, 1)
    early = in_window(batch.mask[:, 1:], window)
    return credit.at[:, 1:].set(jnp.where(early, found, credit[:, 1:])), memory
