"""Log-ratios as regressions: what is learnt is a policy of which the advantage is known."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.ratio import log_ratio
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


@dataclass(frozen=True, kw_only=True)
class RatioRegression:
    """The mean over rows of `(A / beta - log(pi(a|s) / pi_old(a|s)))^2 / 2`, the log-probs summed over tokens.

    Its optimum is `pi_old exp(A / beta)`, normalised (2412.18279).
    """

    beta: float | Array
    aggregate = staticmethod(sequence_mean_token_mean)

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss.

        Raises:
          ValueError: the engine's share or the advantage is missing.
        """
        if batch.share is None or batch.advantage is None:
            raise ValueError("RatioRegression needs batch.share and batch.advantage; run it through the engine")
        ratio = log_ratio(scores, batch)
        target = jax.lax.stop_gradient(masked_mean(batch.advantage, batch.mask, axis=-1)) / self.beta
        loss = jnp.square(target - ratio.sum(-1)) / 2
        return jnp.sum(batch.share.sum(-1) * masked(batch.rows, loss)), {"ratio": jnp.exp(ratio)}
