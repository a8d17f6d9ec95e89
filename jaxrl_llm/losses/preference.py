"""Losses on pairs: the best rollout of a group against the worst."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.losses.aggregate import pair_mean
from jaxrl_llm.types import Batch, Metrics, Scores, masked


def logistic(chosen: Array, rejected: Array, *, beta: float | Array = 0.1, smoothing: float | Array = 0.0) -> Array:
    """`-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`, `h = chosen - rejected` (DPO, 2305.18290, eq. 7).

    `smoothing` is the probability that a label is flipped (conservative DPO, Mitchell 2023).
    """
    margin = beta * (chosen - rejected)
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)


def implicit_reward(scores: Scores, batch: Batch) -> Array:
    """`sum_t (l - l_ref)`, `[B G]` (DPO, 2305.18290, eq. 5, without beta).

    Raises:
      ValueError: a log-prob was not computed.
    """
    if batch.reference is None or batch.reference.logp is None or scores.logp is None:
        raise ValueError("implicit_reward needs scores.logp and batch.reference.logp: train with a reference")
    return masked(batch.mask, scores.logp - jax.lax.stop_gradient(batch.reference.logp)).sum(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """The mean over pairs of `objective(score of the chosen row, score of the rejected row)`.

    Chosen and rejected are the rows of a group with the highest and the lowest reward among those that count; a group
    whose rewards are equal adds nothing. Use it with a filter that drops such groups (`best_and_worst`), or they count
    in the denominator.

    objective: `(chosen, rejected) -> loss` of pairs.
    score: `(Scores, Batch) -> [B G]`.
    aggregate: `(mask) -> share [B G T]`; a group's share is the sum of its tokens'.
    """

    objective: Callable[[Array, Array], Array] = logistic
    score: Callable[[Scores, Batch], Array] = implicit_reward
    aggregate: Callable[[Array], Array] = pair_mean

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """The loss; metrics are means over pairs: `preference/accuracy`, `margin`, `chosen` and `rejected`.

        Raises:
          ValueError: `batch.share` was not computed.
        """
        if batch.share is None:
            raise ValueError("PreferenceLoss needs batch.share; run it through the engine")
        reward, rows = batch.outcome if batch.reward is None else batch.reward, batch.rows
        value = masked(rows, self.score(scores, batch))
        high, chosen = _pick(jnp.argmax(jnp.where(rows, reward, -jnp.inf), -1), reward, value)
        low, rejected = _pick(jnp.argmin(jnp.where(rows, reward, jnp.inf), -1), reward, value)
        pair = masked((rows.sum(-1) > 1) & (high > low), batch.share.sum((-2, -1)))
        metrics = {
            "preference/accuracy": jnp.sum(pair * (chosen > rejected)),
            "preference/margin": jnp.sum(pair * (chosen - rejected)),
            "preference/chosen": jnp.sum(pair * chosen),
            "preference/rejected": jnp.sum(pair * rejected),
        }
        return jnp.sum(pair * self.objective(chosen, rejected)), metrics


def _pick(row: Array, *columns: Array) -> tuple[Array, ...]:
    return tuple(jnp.take_along_axis(x, row[:, None], -1)[:, 0] for x in columns)
