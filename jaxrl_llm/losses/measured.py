"""A loss that is itself a measure of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredLoss:
    """`sum_t share_t * weight_t * scores.extras[name]_t`: distillation and other losses on whole distributions.

    name: of a measure that gives `[B G T]`.
    aggregate: as `PolicyLoss.aggregate`.
    """

    name: str
    aggregate: Callable[[Array], Array] = token_mean

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss, and the measure as a metric.

        Raises:
          ValueError: the measure or the share was not computed.
        """
        if self.name not in scores.extras or batch.share is None:
            raise ValueError(f"MeasuredLoss needs scores.extras[{self.name!r}]: put it into the recipe's measures")
        value = masked(batch.mask, scores.extras[self.name])
        weight = (
            jnp.ones_like(value) if batch.weight is None else jax.lax.stop_gradient(masked(batch.mask, batch.weight))
        )
        return jnp.sum(batch.share * weight * value), {self.name: value}
