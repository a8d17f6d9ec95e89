"""One loss of two advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jax import Array

from jaxrl_llm.types import Batch, Metrics, Scores, masked


@dataclass(frozen=True, kw_only=True)
class Blend:
    """`w * loss(other advantage) + (1 - w) * loss(batch.advantage)`, `w` being `batch.weight`.

    Clipping is not linear in the advantage, so that mixing the advantages would not do.

    loss: of either advantage, such as `PolicyLoss`; its `terms` count once.
    other: `(Batch) -> [B G T]`: an advantage that is found within groups, as the batch may be one of several parts.
    """

    loss: Any
    other: Callable[[Batch], Array]

    @property
    def aggregate(self) -> Callable[[Array], Array]:
        """Of `loss`."""
        found: Callable[[Array], Array] = self.loss.aggregate
        return found

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The sum, with the metrics of the first.

        Raises:
          ValueError: the weight slot has not run.
        """
        if batch.weight is None:
            raise ValueError("Blend needs batch.weight, the share of the other advantage")
        first, metrics = self.loss(scores, replace(batch, advantage=self.other(batch)))
        rest = replace(batch, weight=masked(batch.mask, 1 - batch.weight))
        second, _ = replace(self.loss, terms=())(scores, rest)
        return first + second, {**metrics, "loss/second": second, "blend": masked(batch.mask, batch.weight)}
