"""DGPO: distribution guided policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.types import Batch, Scores, masked


def deviation(logits: Array, tokens: Array, hidden: Array, *, reference: Array, power: float | Array = 1.0) -> Array:
    """`d * (H / log V)^power`, `[...]`: squared Hellinger distance to the reference, where the policy is undecided."""
    p, q = jax.nn.log_softmax(jax.lax.stop_gradient(logits)), jax.nn.log_softmax(reference)
    distance = jnp.maximum(1 - jnp.sum(jnp.exp((p + q) / 2), axis=-1), 0.0)
    entropy = jnp.maximum(-jnp.sum(jnp.exp(p) * p, axis=-1), 0.0)
    return distance * (entropy / jnp.log(float(logits.shape[-1]))) ** power


def redistribute(score: Array, mask: Array, *, tau: float | Array) -> Array:
    """`L * softmax(score / tau)` over the tokens of a row that count, `[T]`: 1 on average."""
    share = jax.nn.softmax(jnp.where(mask, score / tau, -1e30))
    return masked(mask, mask.sum() * share)


def credit(scores: Scores, batch: Batch, *, tau: float | Array) -> dict[str, Array]:
    """Each token's share of its row's advantage, `[B G T]`.

    Raises:
      ValueError: the measure is missing.
    """
    if "deviation" not in scores.extras:
        raise ValueError("credit needs scores.extras['deviation']: put `deviation` into the recipe's measures")
    score = masked(batch.mask, scores.extras["deviation"])
    return {"credit": jax.vmap(jax.vmap(partial(redistribute, tau=tau)))(score, batch.mask)}


def credited(
    ratio: Array, advantage: Array, logp: Array, *, surrogate: Callable[..., Array], credit: Array | float = 1.0
) -> Array:
    """The surrogate with `credit * A` for the advantage."""
    return surrogate(ratio, credit * advantage, logp)


def dgpo(*, group_size: int = 8, clip: float = 0.2, power: float = 1.0, tau: float = 0.5) -> Algorithm:
    """`grpo` whose credit goes to the tokens where the policy left the reference while it was undecided.

    Source: "Distribution Guided Policy Optimization", 2605.03327.
    Deviations: partial: from a description of the method, not the paper's text; others read the distance without its
      square, or divide by the mean in place of the softmax. Distance and entropy are of the current policy at
      temperature 1.
    Limit: at the reference, or with tau at infinity, it is `grpo` with kl=None.
    Family: credit.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip: both widths.  # not in the paper
      power: kappa, of the normalised entropy.
      tau: of the softmax over a row; 0.5 to 1 in the paper.
    """
    surrogate = partial(credited, surrogate=partial(clip_min, low=clip, high=clip))
    return replace(
        grpo(group_size=group_size, kl=None),
        measures={"deviation": partial(deviation, power=power)},
        loss=PolicyLoss(surrogate=surrogate, aggregate=sequence_mean_token_mean, prepare=partial(credit, tau=tau)),
    )
