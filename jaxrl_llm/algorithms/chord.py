"""CHORD: controllable harmonisation of on- and off-policy RL by dynamic weighting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.advantages.sources import among_own, one_on_injected
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts.mixed import with_logged
from jaxrl_llm.types import Batch


def alike(p: Array) -> Array:
    """1: every token of a demonstration counts the same (CHORD-mu)."""
    return jnp.ones_like(p)


def uncertain(p: Array) -> Array:
    """`p (1 - p)`: tokens the policy is sure of, or sure not to say, count little (CHORD-phi)."""
    return p * (1 - p)


def probable(p: Array) -> Array:
    """`p`: the importance weight of a demonstration whose author was certain."""
    return p


def weighted_likelihood(ratio: Array, advantage: Array, logp: Array, *, weight: Callable[[Array], Array]) -> Array:
    """`-sg[weight(p)] * A * l`."""
    p = jnp.exp(jnp.clip(jax.lax.stop_gradient(logp), -20.0, 0.0))
    return -weight(p) * advantage * logp


def warm_cosine(batch: Batch, *, peak: float | Array, valley: float | Array, warmup: int, decay: int) -> Array:
    """`mu`, `[]`: 0 to `peak` linearly in `warmup` steps, to `valley` by a cosine in `decay` more, then `valley`."""
    after = jnp.clip((batch.step - warmup) / max(decay, 1), 0.0, 1.0)
    falling = valley + (peak - valley) * (1 + jnp.cos(jnp.pi * after)) / 2
    return jnp.where(batch.step < warmup, peak * batch.step / max(warmup, 1), falling)


def rest(batch: Batch, *, of: Callable[[Batch], Array]) -> Array:
    """`1 - mu`."""
    return 1 - of(batch)


def chord(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    peak: float = 0.1,
    valley: float = 0.1,
    warmup: int = 0,
    decay: int = 200,
    weighting: Callable[[Array], Array] = uncertain,
) -> Algorithm:
    """`grpo` on own samples and `sft` on a demonstration of the same prompt, the latter weighted by token and by step.

    `(1 - mu) * L_GRPO + mu * L_SFT`, each with its own denominator; advantages are those among the policy's own rows.
    The defaults are CHORD-phi; CHORD-mu is `peak=0.9, valley=0.05, weighting=alike`.

    Source: "On-Policy RL Meets Off-Policy Experts", 2508.11408; schedule and weights as in the code of Trinity-RFT.
    Deviations: demonstrations are of the step's own prompts, one for each; in the released code they are a fifth of the
      batch, drawn from a data set of their own. No divergence.
    Limit: peak=valley=0 is `grpo` with kl=None; peak=valley=1 with `alike` is `sft`.
    Family: supervised and mixed data.

    Args:
      group_size: own samples a prompt.
      clip: both widths; 0.2 in the released code.
      peak: mu after the warm-up; 0.1, constant, for CHORD-phi.
      valley: mu in the end.
      warmup: steps from 0 to the peak; 0 for CHORD-mu, 200 in Trinity's example.
      decay: steps from the peak to the valley; 200 for CHORD-mu, 400 in Trinity's example.
      weighting: of a demonstration's tokens by their probability: `uncertain`, `alike` or `probable`.

    Raises:
      ValueError: a negative number of steps.
    """
    if warmup < 0 or decay < 0:
        raise ValueError(f"chord: warmup and decay must be 0 or more steps, got {warmup} and {decay}")
    explore = PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=sequence_mean_token_mean)
    mu = partial(warm_cosine, peak=peak, valley=valley, warmup=warmup, decay=decay)
    expert = PolicyLoss(surrogate=partial(weighted_likelihood, weight=weighting), aggregate=token_mean)
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=partial(with_logged, size=group_size),
        advantage=chain(partial(among_own, advantage=partial(per_group, center_scale)), one_on_injected),
        loss=MixedLoss(
            parts={
                "own": Part(rows=own, loss=explore, weight=partial(rest, of=mu)),
                "expert": Part(rows=injected, loss=expert, weight=mu),
            }
        ),
    )
