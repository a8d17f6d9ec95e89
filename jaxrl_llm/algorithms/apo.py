"""APO: asymmetric policy optimisation (View-R1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.together import Together
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Scores, masked
from jaxrl_llm.updates.passes import several_passes


def difficulty_weight(correct: Array, keep: Array) -> Array:
    """`1 - exp(-e * p)` of one group, `[]`, with `p` the share of correct rows; 1 if none or all are."""
    n, right = keep.sum(), (keep & correct).sum()
    share = right / jnp.maximum(n, 1)
    return jnp.where((right > 0) & (right < n), 1 - jnp.exp(-jnp.e * share), 1.0)


def difficulty_kl(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`kl_to_reference`, in rows of positive advantage times the `difficulty_weight` of their group, `[B G T]` (DADS).

    Raises:
      ValueError: advantages, or log-probs of the reference, are missing.
    """
    if batch.advantage is None:
        raise ValueError("difficulty_kl needs batch.advantage")
    of_group = jnp.vectorize(difficulty_weight, signature="(g),(g)->()")(batch.outcome >= 1, batch.rows)
    gain = jnp.where(masked(batch.mask, batch.advantage) > 0, of_group[:, None, None], 1.0)
    return gain * kl_to_reference(scores, batch, weight=weight)


def overlong_weight(batch: Batch, *, rate: float | Array) -> Array:
    """`2 - (1 + rate)^-excess`, `[B G]`, for wrong rows `excess` tokens longer than their group's correct ones (STCR).

    1 for all others. It multiplies the token's whole loss, which is the same as its advantage.
    """
    correct, lengths = batch.outcome >= 1, batch.rollouts.lengths.astype(jnp.float32)
    right = batch.rows & correct
    excess = lengths - masked_mean(lengths, right, axis=-1, keepdims=True)
    wrong = batch.rows & ~correct & right.any(-1, keepdims=True)
    # 1 + rate would lose the rate's digits.
    return jnp.where(wrong, 2 - jnp.exp(-jnp.maximum(excess, 0) * jnp.log1p(jnp.asarray(rate))), 1.0)


def apo(
    *, group_size: int = 8, clip: float = 0.2, kl: float | None = 1e-3, rate: float = 1e-5, minibatches: int = 1
) -> Algorithm:
    """`grpo` that treats right and wrong answers differently.

    Right answers to hard prompts are held less by the divergence; wrong answers longer than the right ones count more.

    Source: "Asymmetric Policy Optimization" (View-R1), 2506.21655: DADS (divergence) and STCR (length); the rest as
      released.
    Deviations: correct means a verifier's outcome of at least 1; the released code finds it in a reward that counts
      format too.
    Limit: with kl=None and rate=0 it is `grpo` with kl=None and `token_mean`.
    Family: credit.

    Args:
      group_size: responses a prompt.
      clip: both widths.
      kl: weight of the divergence, a mean over rows; None or 0 drops the reference.
      rate: how fast the weight of a wrong answer grows with every token it is too long.
      minibatches: optimiser steps a batch; 16 as released.  # 1: not in the paper
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=partial(per_group, partial(center_scale, eps=1e-9)),
        weight=partial(overlong_weight, rate=rate),
        loss=Together(
            loss=PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=token_mean),
            terms=optional(difficulty_kl, weight=kl),
            share=sequence_mean_token_mean,
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
