"""RL-PLUS: hybrid-policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.dr_grpo import dr_grpo
from jaxrl_llm.losses.aggregate import token_sum_over
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.rollouts.mixed import with_logged
from jaxrl_llm.types import INJECTED, Batch, Scores, masked


def mixture_weight(pi: Array, old: Array, *, unknown: float | Array = 1.0) -> Array:
    """`2 pi / (old + o)`, `o = (old + unknown) / 2`: bounded by `4 / unknown` however unlikely the token was.

    The expert's own probability of the token is not known: `o` is what is assumed of it.
    """
    return 2 * pi / (old + (old + unknown) / 2)


def exploration(pi: Array, *, gamma: float | Array = 0.5) -> Array:
    """`(1 - pi)^gamma` without gradient: right tokens that the policy would not have said count most."""
    return jax.lax.stop_gradient(jnp.maximum(1 - pi, 0.0)) ** gamma


def hybrid_ratio(scores: Scores, batch: Batch, *, gamma: float | Array, unknown: float | Array) -> Array:
    """`mixture_weight * exploration` at injected tokens, `r` at the policy's own, `[B G T]`.

    Raises:
      ValueError: a log-prob was not computed.
    """
    if scores.logp is None:
        raise ValueError("hybrid_ratio needs scores.logp")
    foreign = batch.mask & (batch.rollouts.role == INJECTED)
    pi = jnp.exp(masked(foreign, scores.logp))
    old = jnp.exp(jax.lax.stop_gradient(masked(foreign, recomputed(batch))))
    weight = mixture_weight(pi, old, unknown=unknown) * exploration(pi, gamma=gamma)
    return jnp.where(foreign, weight, token_ratio(scores, batch, old=recomputed))


def rl_plus(
    *,
    group_size: int = 8,
    gamma: float = 0.5,
    unknown: float = 1.0,
    entropy: float | None = 0.001,
    max_length: int | None = None,
) -> Algorithm:
    """`dr_grpo` without clipping on groups with one demonstration, whose tokens have a weight of their own.

    That weight has the old policy and a constant in its denominator, so that it is bounded, and is larger the less
    likely the policy was to say the token.

    Source: RL-PLUS, 2508.00222, with the constants of the released code.
    Deviations: divided by the number of rows as well as by the length, where the released code sums over rows; the
      entropy bonus has the same denominator.
    Limit: without demonstrations it is `dr_grpo` without clipping.
    Family: supervised and mixed data.

    Args:
      group_size: rows a prompt, the demonstration included; at least 2, and 8 in the paper.
      gamma: exponent of `exploration`; 0.5 in the paper.
      unknown: what stands for the expert's own distribution: 1 in the released code, 1/V in the paper.
      entropy: weight of the entropy bonus; None or 0 for none.
      max_length: the constant, in tokens; the generation budget if None.

    Raises:
      ValueError: there is no room for an own sample.
    """
    if group_size < 2:
        raise ValueError(
            f"rl_plus puts one demonstration into each group: group_size must be 2 or more, got {group_size}"
        )
    return replace(
        dr_grpo(max_length=max_length),
        rollout=partial(with_logged, size=group_size - 1),
        loss=PolicyLoss(
            ratio=partial(hybrid_ratio, gamma=gamma, unknown=unknown),
            surrogate=unclipped,
            aggregate=partial(token_sum_over, constant=max_length),
            terms=optional(entropy_bonus, weight=entropy),
        ),
    )
