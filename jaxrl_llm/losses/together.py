"""A loss and terms that count other tokens than it does, each with a denominator of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


def counted(batch: Batch) -> Array:
    """`[B G T]` bool: the tokens the loss counts."""
    return batch.mask


def valued(batch: Batch) -> Array:
    """`[B G T]` bool: the tokens a critic learns from; those the loss counts if the rollout says nothing of it.

    Rows that the filter dropped are not among them.
    """
    if batch.rollouts.valued is None:
        return batch.mask
    return batch.rollouts.valued if batch.keep is None else batch.rollouts.valued & batch.keep[..., None]


def unselected(batch: Batch) -> Array:
    """`[B G T]` bool: the tokens of rows that are kept, whichever of them the weight slot selected."""
    return dataclasses.replace(batch, select=None).mask


def correct_tokens(batch: Batch, *, threshold: float = 0.5) -> Array:
    """`[B G T]` bool: the tokens the loss counts in rows whose outcome is above the threshold."""
    return batch.mask & (batch.outcome > threshold)[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Together:
    """`loss + sum_t share'_t * sum_k term_k,t` with `share' = share(tokens(batch))`, over the whole optimiser step.

    loss: `(Scores, Batch) -> (scalar, metrics)`, such as `PolicyLoss`, with its `aggregate` and `prepare`.
    terms: each `(Scores, Batch) -> [B G T]`. They are given a batch whose `mask` is `tokens`.
    tokens: `(Batch) -> [B G T]` bool: what the terms count; a function of each row by itself.
    share: `(mask) -> share [B G T]`: how much each of those counts.
    """

    loss: Any
    terms: tuple[Callable[[Scores, Batch], Array], ...]
    tokens: Callable[[Batch], Array] = counted
    share: Callable[[Array], Array] = token_mean

    @property
    def aggregate(self) -> Callable[[Array], Array]:
        """Of `loss`."""
        found: Callable[[Array], Array] = getattr(self.loss, "aggregate", None) or token_mean
        return found

    def prepare(self, scores: Scores, batch: Batch) -> dict[str, Any]:
        """What `loss` prepares, and the shares of the terms."""
        prepare = getattr(self.loss, "prepare", None)
        return {"loss": prepare(scores, batch) if prepare else {}, "share": self.share(self.tokens(batch))}

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The sum; the metric `loss/NAME` of a term is the mean its shares make.

        Raises:
          ValueError: `prepare` has not run.
        """
        if batch.prepared is None:
            raise ValueError("Together needs batch.prepared; run it through the engine")
        prepared, tokens = batch.prepared, self.tokens(batch)
        loss, metrics = self.loss(scores, dataclasses.replace(batch, prepared=prepared["loss"]))
        own = dataclasses.replace(batch, rollouts=dataclasses.replace(batch.rollouts, mask=tokens), keep=None)
        own = dataclasses.replace(own, select=None, share=prepared["share"], prepared=None)
        for term in self.terms:
            value = jnp.sum(prepared["share"] * masked(tokens, term(scores, own)))
            loss, metrics = loss + value, {**metrics, f"loss/{_name(term)}": value}
        return loss, metrics


def _name(term: Any) -> str:
    while isinstance(term, functools.partial):
        term = term.func
    return getattr(term, "__name__", type(term).__name__)
