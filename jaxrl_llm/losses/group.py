"""Losses on the rows of one prompt: functions of whole responses that no sum over tokens can say."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import pair_mean
from jaxrl_llm.losses.ratio import Old, behaviour, log_ratio
from jaxrl_llm.types import Batch, Metrics, Scores, masked


def sequence_logp(scores: Scores, batch: Batch) -> Array:
    """`sum_t l`, `[B G]`.

    Raises:
      ValueError: `scores.logp` was not computed.
    """
    if scores.logp is None:
        raise ValueError("sequence_logp needs scores.logp")
    return masked(batch.mask, scores.logp).sum(-1)


def sequence_log_ratio(scores: Scores, batch: Batch, *, old: Old = behaviour) -> Array:
    """`sum_t (l - l_old)`, `[B G]`: the log of a response's importance ratio, clamped to +-20."""
    return jnp.clip(log_ratio(scores, batch, old=old).sum(-1), -20.0, 20.0)


def mean_over_pairs(
    pair: Callable[[Array, Array, Array, Array], Array], score: Array, reward: Array, rows: Array
) -> Array:
    """The mean of `pair(score_i, score_j, reward_i, reward_j)` over the pairs of rows that count; 0 if there is none.

    Args:
      pair: of arrays of one shape, symmetric: exchanging the rows changes nothing.
      score: `[G]`.
      reward: `[G]`.
      rows: `[G]` bool.

    Returns:
      a scalar.
    """
    first, second = jnp.triu_indices(rows.shape[0], 1)
    both = rows[first] & rows[second]
    loss = masked(both, pair(score[first], score[second], reward[first], reward[second]))
    return loss.sum() / jnp.maximum(both.sum(), 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupLoss:
    """The mean over prompts of `objective`, which sees one group at a time.

    objective: `(score [G], reward [G], rows [G] bool) -> scalar`; both are 0 where a row does not count.
    score: `(Scores, Batch) -> [B G]`, what the gradient goes through.
    aggregate: `(mask) -> share [B G T]`; a group's share is the sum of its tokens'.
    """

    objective: Callable[[Array, Array, Array], Array]
    score: Callable[[Scores, Batch], Array]
    aggregate: Callable[[Array], Array] = pair_mean

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss, and the metric `score` `[B G]`.

        Raises:
          ValueError: `batch.share` was not computed.
        """
        if batch.share is None:
            raise ValueError("GroupLoss needs batch.share; run it through the engine")
        rows, share = batch.rows, batch.share.sum((-2, -1))
        score = masked(rows, self.score(scores, batch))
        reward = masked(rows, jax.lax.stop_gradient(batch.outcome if batch.reward is None else batch.reward))
        loss = jax.vmap(self.objective)(score, reward, rows)
        return jnp.sum(share * masked(share > 0, loss)), {"score": score}
