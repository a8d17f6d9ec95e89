"""Generalised advantage estimation with a critic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.returns import token_rewards
from jaxrl_llm.stats import discounted_sum
from jaxrl_llm.types import Batch, masked


def sequence_gae(reward: Array, value: Array, mask: Array, *, gamma: float = 1.0, lam: float = 0.95) -> Array:
    """`A_t = delta_t + gamma * lam * A_{t+1}`, `delta_t = r_t + gamma * v_{t+1} - v_t`, of one sequence, `[T]`.

    Tokens that do not count are stepped over: the next value and advantage are those of the next token that does.
    After the last one the value is 0, for truncated rows too.
    """
    reward, value = masked(mask, reward), masked(mask, value)
    from_here = discounted_sum(value, jnp.where(mask, 0.0, 1.0))
    following = jnp.append(from_here[1:], 0.0)
    delta = masked(mask, reward + gamma * following - value)
    return masked(mask, discounted_sum(delta, jnp.where(mask, gamma * lam, 1.0)))


def gae(batch: Batch, *, gamma: float = 1.0, lam: float = 0.95) -> Array:
    """Advantages from `batch.token_reward` and the critic's `batch.value`, `[B G T]` (GAE, 1506.02438, eq. 16).

    Raises:
      ValueError: there is no critic, or the reward slot has not run.
    """
    fn = functools.partial(sequence_gae, gamma=gamma, lam=lam)
    return jax.vmap(jax.vmap(fn))(token_rewards(batch), _values(batch), batch.mask)


def returns(batch: Batch, *, gamma: float = 1.0, lam: float = 0.95) -> Array:
    """`A + v`, what the critic should learn, `[B G T]`: with the advantage before any whitening."""
    return gae(batch, gamma=gamma, lam=lam) + masked(batch.mask, _values(batch))


def _values(batch: Batch) -> Array:
    if batch.value is None:
        raise ValueError("gae needs batch.value: train with a critic (the engine adds it for recipes that read it)")
    return batch.value
