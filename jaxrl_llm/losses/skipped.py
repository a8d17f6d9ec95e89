"""A loss that is left out where the policy is too far from the one that sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import log_ratio
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Metrics, Scores


def clamped_ratio(scores: Scores, batch: Batch, *, bound: float | Array = 10.0) -> Array:
    """`exp(clip(D, -bound, bound))`, `[B G T]`."""
    return jnp.exp(jnp.clip(log_ratio(scores, batch), -bound, bound))


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlessFar:
    """`loss`, or 0 in optimiser steps whose mean ratio is above `bound`.

    loss: `(Scores, Batch) -> (scalar, metrics)`, with its `aggregate` and `prepare`.
    ratio: `(Scores, Batch) -> [B G T]`.
    """

    loss: Any
    bound: float | Array = 10.0
    ratio: Callable[[Scores, Batch], Array] = clamped_ratio

    @property
    def aggregate(self) -> Callable[[Array], Array]:
        """Of `loss`."""
        found: Callable[[Array], Array] = getattr(self.loss, "aggregate", None) or token_mean
        return found

    def prepare(self, scores: Scores, batch: Batch) -> dict[str, Any]:
        """What `loss` prepares, and whether the step is skipped."""
        prepare = getattr(self.loss, "prepare", None)
        far = masked_mean(self.ratio(scores, batch), batch.mask) > self.bound
        return {"loss": prepare(scores, batch) if prepare else {}, "skipped": far}

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss.

        Raises:
          ValueError: `prepare` has not run.
        """
        if batch.prepared is None:
            raise ValueError("UnlessFar needs batch.prepared; run it through the engine")
        value, metrics = self.loss(scores, dataclasses.replace(batch, prepared=batch.prepared["loss"]))
        return jnp.where(batch.prepared["skipped"], 0.0, value), metrics
