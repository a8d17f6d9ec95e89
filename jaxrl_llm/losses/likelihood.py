"""Supervised fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeLogLikelihood:
    """`-sum_t share_t * weight_t * l_t`: cross entropy of the tokens that count, whoever wrote them.

    aggregate: `(mask) -> share [B G T]`, over the whole optimiser step.
    """

    aggregate: Callable[[Array], Array] = token_mean

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss, and the metric `nll` `[B G T]` in nats.

        Raises:
          ValueError: the share or the log-probs were not computed.
        """
        if scores.logp is None or batch.share is None:
            raise ValueError("NegativeLogLikelihood needs scores.logp and batch.share; run it through the engine")
        nll = -masked(batch.mask, scores.logp)
        weight = jnp.ones_like(nll) if batch.weight is None else jax.lax.stop_gradient(masked(batch.mask, batch.weight))
        return jnp.sum(batch.share * weight * nll), {"nll": nll}


def weighted_logp(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
    """`sum_t A_t * l_t`, and no metrics: linear in the advantages, so differentiable by them.

    Raises:
      ValueError: the log-probs or the advantages were not computed.
    """
    if scores.logp is None or batch.advantage is None:
        raise ValueError("weighted_logp needs scores.logp and batch.advantage")
    return jnp.sum(masked(batch.mask, batch.advantage) * masked(batch.mask, scores.logp)), {}
