"""URPA: uncertainty-quantified rollout policy adaptation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.rewards.numbers import Read, last_numbers
from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.tasks.characters import IDS, ZERO
from jaxrl_llm.types import Batch, masked

Agreement = Callable[[Array, Array], Array]

# Of the procedural tasks' tokenizer.
LAST_TWO: Read = partial(last_numbers, count=2, zero=ZERO, point=IDS["."])


def overlap(a: Array, b: Array) -> Array:
    """Intersection over union of two intervals `[2]`, `[]`; 0 if one ends before it starts."""
    inter = jnp.maximum(jnp.minimum(a[1], b[1]) - jnp.maximum(a[0], b[0]), 0.0)
    union = jnp.maximum(a[1], b[1]) - jnp.minimum(a[0], b[0])
    return jnp.where(inter > 0, inter / jnp.where(inter > 0, union, 1.0), 0.0)


def closeness(a: Array, b: Array) -> Array:
    """`exp(-|a - b|)`, the sum over `[n]`, `[]`: for answers that are no intervals."""
    return jnp.exp(-jnp.abs(a - b).sum())


def consensus(said: Array, known: Array, *, agreement: Agreement, gamma: float | Array, ddof: int) -> Array:
    """`exp(-gamma u)` times the agreement of each row with the mean of all, `[G]`; `u` is the sum of their stds.

    Args:
      said: `[G n]`.
      known: `[G]` bool; the others have no part in it, and get 0.
      agreement: `([n], [n]) -> []`.
      gamma: how much disagreement costs.
      ddof: of the standard deviations.
    """
    both = jnp.broadcast_to(known[:, None], said.shape)
    spread = jnp.sqrt(masked_var(said, both, ddof=ddof, axis=0)).sum()
    label = masked_mean(said, both, axis=0)
    return masked(known, jnp.exp(-gamma * spread) * jax.vmap(agreement, in_axes=(0, None))(said, label))


def form_and_consensus(
    batch: Batch, *, read: Read, trust: Callable[[Array, Array], Array], form: float | Array, weight: float | Array
) -> Array:
    """`form * outcome + weight * trust(what the rows say)`, `[B G]`."""
    said, known = jax.vmap(jax.vmap(read))(batch.rollouts.tokens, batch.mask)
    return form * batch.outcome + weight * jax.vmap(trust)(said, known & batch.rows)


def urpa(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float | None = 0.04,
    gamma: float = 0.1,
    form: float = 0.5,
    weight: float = 0.5,
    read: Read = LAST_TWO,
    agreement: Agreement = overlap,
    ddof: int = 1,
    credit: Callable[[Array, Array], Array] = center,
) -> Algorithm:
    """`grpo` without labels: the mean of a group's numeric predictions is the label, trusted as far as they agree.

    The verifier judges the form of a response alone.

    Source: "Uncertainty-quantified Rollout Policy Adaptation", 2508.06317, the phase in the target domain.
    Deviations: without division by the standard deviation, in which the confidence cancels once all responses are
      well-formed (`credit=center_scale` is the paper's). Predictions that cannot be read have no part in the label.
      The phase before, on labelled data with widened labels, is not here.
    Limit: with form=1 and weight=0 it is `grpo` with the same credit.
    Family: rewards and budgets.

    Args:
      group_size: responses a prompt.
      clip: both widths.
      kl: weight of the divergence in the loss.  # not in the paper
      gamma: of the confidence, for each unit (second) of disagreement.  # not in the paper, which tries 0.01 to 0.5
      form: weight of the outcome.
      weight: of the agreement.
      read: `(tokens [T], mask [T]) -> (numbers [n], whether they are there)`; the last two of the procedural tasks'
        tokenizer if not given.
      agreement: `overlap` of intervals, or `closeness` of numbers.
      ddof: of the standard deviations.  # not in the paper
      credit: advantages of a group.
    """
    trust = partial(consensus, agreement=agreement, gamma=gamma, ddof=ddof)
    return replace(
        grpo(group_size=group_size, clip=clip, kl=kl),
        reward=partial(form_and_consensus, read=read, trust=trust, form=form, weight=weight),
        advantage=partial(per_group, credit),
    )
