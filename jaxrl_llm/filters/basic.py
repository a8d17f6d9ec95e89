"""Which rollouts count. Judged on the verifier's outcome, never on a shaped reward."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import mixed
from jaxrl_llm.types import Batch


def everything(batch: Batch) -> Array:
    """`[B G]` bool: every row."""
    return jnp.ones(batch.outcome.shape, bool)


def correct(batch: Batch, *, threshold: float = 0.5) -> Array:
    """`[B G]` bool: rows whose outcome is above the threshold."""
    return batch.outcome > threshold


def informative(batch: Batch, *, threshold: float = 0.5) -> Array:
    """`[B G]` bool: the rows of groups with `0 < correct < G` (DAPO, 2503.14476, eq. 11). Groups stay whole.

    Rows that do not count (unscored, empty, dropped by an earlier stage) are neither correct nor wrong.
    """
    group = mixed(batch.outcome, batch.rows, threshold=threshold)
    return jnp.broadcast_to(group[..., None], batch.outcome.shape)


def not_truncated(batch: Batch) -> Array:
    """`[B G]` bool: rows that ended by themselves (overlong filtering, DAPO, 2503.14476, section 3.4)."""
    return ~batch.rollouts.truncated


def distinct(batch: Batch) -> Array:
    """`[B G]` bool: of the rows of a group with the same tokens the first that counts (RFT, 2308.01825).

    Tokens are compared where a row has any, whoever wrote them; put it after the filters it should follow.
    """
    written = jnp.where(batch.rollouts.attended, batch.rollouts.tokens, -1)
    same = (written[:, :, None] == written[:, None, :]).all(-1)  # [B G G]
    earlier = jnp.tril(jnp.ones(same.shape[-2:], bool), k=-1)
    return ~(same & earlier & batch.rows[:, None, :]).any(-1)
