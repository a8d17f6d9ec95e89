"""Several losses, each on rows of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


def own(batch: Batch) -> Array:
    """`[B G]` bool: rows of the policy."""
    return ~batch.rollouts.injected


def injected(batch: Batch) -> Array:
    """`[B G]` bool: rows somebody else wrote."""
    return batch.rollouts.injected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A loss and the rows it is for.

    rows: `(Batch) -> [B G]` bool.
    loss: `(Scores, Batch) -> (scalar, metrics)`, with its `aggregate` and `prepare`; for it no other rows count.
    weight: a number, or `(Batch) -> []`, a schedule of `batch.step`.
    """

    rows: Callable[[Batch], Array]
    loss: Any
    weight: float | Array | Callable[[Batch], Array] = 1.0

    def of(self, batch: Batch) -> Batch:
        """The batch in which only this part's rows count."""
        rows = jnp.broadcast_to(self.rows(batch)[..., None], batch.rollouts.mask.shape)
        return dataclasses.replace(batch, select=rows if batch.select is None else rows & batch.select)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixedLoss:
    """`sum_k weight_k * loss_k`, the shares of each found over its own rows: one source does not dilute another.

    parts: by name. Metrics are `NAME/metric`, token means over the part's rows, and `loss/NAME`, its loss before the
        weight.
    """

    parts: dict[str, Part]

    def prepare(self, scores: Scores, batch: Batch) -> dict[str, Any]:
        """By part: its shares, its number of tokens, and what its own loss prepares."""
        return {name: _prepared(part.loss, scores, part.of(batch)) for name, part in self.parts.items()}

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss.

        Raises:
          ValueError: the shares were not prepared.
        """
        if batch.prepared is None:
            raise ValueError("MixedLoss needs batch.prepared; run it through the engine")
        total, metrics = jnp.zeros(()), {}
        for name, part in self.parts.items():
            whole = batch.prepared[name]
            mine = dataclasses.replace(part.of(batch), share=whole["share"], prepared=whole["inner"])
            value, found = part.loss(scores, mine)
            total = total + (part.weight(batch) if callable(part.weight) else part.weight) * value
            metrics[f"loss/{name}"] = value
            for key, x in found.items():
                metrics[f"{name}/{key}"] = _mean(x, mine.mask, whole["tokens"])
        return total, metrics


def _prepared(loss: Callable[..., Any], scores: Scores, batch: Batch) -> dict[str, Any]:
    share = getattr(loss, "aggregate", token_mean)(batch.mask)
    prepare = getattr(loss, "prepare", None)
    inner = prepare(scores, dataclasses.replace(batch, share=share)) if prepare else None
    return {"share": share, "tokens": jnp.maximum(batch.mask.sum(), 1), "inner": inner}


def _mean(x: Array, mask: Array, tokens: Array) -> Array:
    """This part of the mean over all of the part's tokens: micro-batches add up."""
    return masked(mask, x.astype(jnp.float32)).sum() / tokens if jnp.ndim(x) == 3 else x
