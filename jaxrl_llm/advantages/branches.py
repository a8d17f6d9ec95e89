"""Credit that the rollout found by branching, and its normalisation over the tokens a policy was unsure of."""

from __future__ import annotations

from collections.abc import Callable

from jax import Array

from jaxrl_llm import stats
from jaxrl_llm.advantages.basic import raw
from jaxrl_llm.types import Batch, masked


def credited(batch: Batch) -> Array:
    """`batch.rollouts.credit`, `[B G T]`; the row's reward if the rollout found none."""
    return raw(batch) if batch.rollouts.credit is None else masked(batch.mask, batch.rollouts.credit)


def whiten_where(batch: Batch, *, where: Callable[[Batch], Array], ddof: int = 1, eps: float = 1e-8) -> Array:
    """`whiten` over the tokens that count and are `where` (`[B G T]` bool), `[B G T]`; 0 at the others.

    Raises:
      ValueError: no advantage was computed before.
    """
    if batch.advantage is None:
        raise ValueError("whiten_where normalises batch.advantage: put it after another advantage in a chain")
    return stats.whiten(batch.advantage, batch.mask & where(batch), ddof=ddof, eps=eps)
