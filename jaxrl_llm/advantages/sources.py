"""Credit in groups where somebody else wrote some of the rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, masked


def among_own(batch: Batch, *, advantage: Callable[[Batch], Array]) -> Array:
    """`advantage` of the policy's own rows, found as if there were no others, `[B G T]`; 0 on injected rows."""
    own = ~batch.rollouts.injected
    keep = own if batch.keep is None else own & batch.keep
    credit = advantage(dataclasses.replace(batch, keep=keep))
    return masked(own[..., None], credit)


def one_on_injected(batch: Batch) -> Array:
    """1 on rows somebody else wrote, `[B G T]`: demonstrations are to become more likely.

    A later stage of an advantage chain: it leaves the policy's own rows as they are.

    Raises:
      ValueError: no advantage was computed before.
    """
    if batch.advantage is None:
        raise ValueError("one_on_injected completes batch.advantage: put it after another advantage in a chain")
    return jnp.where(batch.rollouts.injected[..., None], 1.0, batch.advantage)
