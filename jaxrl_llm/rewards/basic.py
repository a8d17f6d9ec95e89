"""The verifier's outcome as the reward, and where a row's reward sits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, masked


def verified(batch: Batch) -> Array:
    """`[B G]`: the verifier's outcome, unchanged."""
    return batch.outcome


def signed(batch: Batch) -> Array:
    """`[B G]`: `2 * outcome - 1`, so that 0 and 1 become -1 and +1 (DAPO, 2503.14476, eq. 7)."""
    return 2 * batch.outcome - 1


def at_last_token(mask: Array, reward: Array) -> Array:
    """`[... T]` with `reward` (`[...]`) at the last token of each row that has one, 0 elsewhere."""
    after = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    return masked(mask & (after == 1), jnp.broadcast_to(reward[..., None], mask.shape))


def token_rewards_so_far(batch: Batch) -> Array:
    """`[B G T]`: what earlier stages of the reward chain gave; the outcome at the last token if there were none."""
    if batch.token_reward is not None:
        return masked(batch.rollouts.mask, batch.token_reward)
    return at_last_token(batch.rollouts.mask, batch.outcome if batch.reward is None else batch.reward)
