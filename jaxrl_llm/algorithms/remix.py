"""ReMix: on-policy methods that learn from recent off-policy data."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.kl import Estimator, as_loss, k3, kl_to_reference
from jaxrl_llm.losses.ratio import behaviour, recomputed
from jaxrl_llm.rollouts.recent import sample_or_recall
from jaxrl_llm.types import Batch, Metrics, Scores, masked
from jaxrl_llm.updates.passes import several_passes
from jaxrl_llm.updates.previous import previous, with_previous
from jaxrl_llm.updates.restart import restarting


def clip_around(ratio: Array, advantage: Array, logp: Array, *, center: Array, width: float | Array) -> Array:
    """`-min(A r, A clip(r, c - width, c + width))`: proximal to the policy before the update, whoever sampled."""
    return -jnp.minimum(advantage * ratio, advantage * jnp.clip(ratio, center - width, center + width))


def centers(scores: Scores, batch: Batch) -> dict[str, Array]:
    """`c = pi_k / pi_behaviour`, `[B G T]`: the ratio before the update; 1 for what `pi_k` sampled."""
    return {"center": jnp.exp(jnp.clip(masked(batch.mask, recomputed(batch) - behaviour(batch)), -20.0, 20.0))}


def share_of_base(step: Array, *, floor: float | Array = 0.5) -> Array:
    """`max(1 - 0.1 ceil(max(t - 50, 0) / 10), floor)`, `[]`."""
    tens = -(-jnp.maximum(step - 50, 0) // 10)
    return jnp.maximum(1 - 0.1 * tens, floor)


def convex_kl(
    scores: Scores, batch: Batch, *, weight: float | Array, estimator: Estimator, floor: float | Array
) -> Array:
    """`weight * (lam KL(pi || base) + (1 - lam) KL(pi || pi_{k-1}))`, `[B G T]`."""
    lam = share_of_base(batch.step, floor=floor)
    to_base = kl_to_reference(scores, batch, weight=1.0, estimator=estimator)
    step_ago = replace(batch, reference=Scores(logp=previous(batch)))
    return weight * (lam * to_base + (1 - lam) * kl_to_reference(scores, step_ago, weight=1.0, estimator=estimator))


def reused(
    key: Array, models: Any, batch: Batch, learn: Any, *, until: int, epochs: int, minibatches: int
) -> tuple[Any, Metrics]:
    """`epochs` passes before step `until`, one from then on."""
    passes = [partial(several_passes, epochs=n, minibatches=minibatches) for n in (epochs, 1)]
    early, late = (lambda models, batch, f=f: f(key, models, batch, learn) for f in passes)
    found: tuple[Any, Metrics] = jax.lax.cond(batch.step < until, early, late, models, batch)
    return found


def remix(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    chance: float = 0.4,
    recent: int = 2,
    epochs: int = 2,
    kl: float | None = 0.04,
    kl_estimator: Estimator = k3,
    floor: float = 0.5,
    entropy: float | None = None,
    reincarnation: int = 100,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` that also learns from what the last policies sampled, twice from each batch, until it is born again.

    Ratios are to the policy that sampled, clipped around where the policy stands before the update. The divergence
    moves from the base to the policy of a step ago. At `reincarnation` the policy becomes the base, the optimiser
    begins anew, and the run goes on on-policy: off-policy data make early progress, and later bound it.

    Source: "Squeeze the Soaked Sponge", 2507.06892: Mix-PPG, KL-Convex and policy reincarnation, the version on GRPO.
    Deviations: no code was released. The mixture is of prompts with their whole groups, and a recalled group answers a
      prompt of its own step. The weights of divergence and entropy and the estimator are not known to us.
    Limit: with chance=0, epochs=1, floor=1 and no reincarnation it is `grpo`.
    Family: supervised and mixed data.

    Args:
      group_size: responses a prompt.  # not in the paper
      clip: both widths.  # not in the paper
      chance: p, that a group is of an earlier policy.
      recent: N, the steps that are remembered.
      epochs: passes over a batch (update to data ratio).
      kl: weight of the divergence; None or 0 for none.  # not in the paper
      kl_estimator: of a token's divergence.  # not in the paper
      floor: the least share of the base in the divergence.
      entropy: weight of the entropy bonus; None or 0 for none.  # not in the paper
      reincarnation: the step; 50 or 100 in the paper.
      minibatches: optimiser steps a pass.  # not in the paper
    """
    terms = optional(convex_kl, weight=kl, estimator=as_loss(kl_estimator), floor=floor)
    update = partial(reused, until=reincarnation, epochs=epochs, minibatches=minibatches)
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=sample_or_recall(size=group_size, steps=recent, chance=chance, until=reincarnation),
        loss=PolicyLoss(
            surrogate=partial(clip_around, width=clip),
            aggregate=sequence_mean_token_mean,
            terms=(*terms, *optional(entropy_bonus, weight=entropy)),
            prepare=centers,
        ),
        update=with_previous(partial(restarting, step=reincarnation, update=update)),
    )
