"""Normalisation over all tokens of the step."""

from __future__ import annotations

from jax import Array

from jaxrl_llm import stats
from jaxrl_llm.types import Batch


def whiten(batch: Batch, *, ddof: int = 1, eps: float = 1e-8) -> Array:
    """`(A - mean) / sqrt(var + eps)` over every token of the batch that counts, `[B G T]`; long rows count more.

    A later stage of an advantage chain: it reads `batch.advantage`. Global over devices, as the batch is.

    Raises:
      ValueError: no advantage was computed before.
    """
    if batch.advantage is None:
        raise ValueError("whiten normalises batch.advantage: put it after another advantage, as in chain(gae, whiten)")
    return stats.whiten(batch.advantage, batch.mask, ddof=ddof, eps=eps)
