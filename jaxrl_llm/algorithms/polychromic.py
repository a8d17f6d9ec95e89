"""Polychromic PPO: sets of responses are rewarded for being right and different."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jax import Array

from jaxrl_llm.advantages.sets import same_tokens, set_advantage
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.losses.divergence import forward_kl
from jaxrl_llm.rollouts.vines import sample_vines
from jaxrl_llm.types import Batch, Rollouts, Scores, Stage, masked


def from_old(logits: Array, tokens: Array, hidden: Array, *, old: Array) -> Array:
    """A measure: `KL(policy before the update || policy)`, `[...]` nats."""
    return forward_kl(logits, old)


def kl_from_old(scores: Scores, batch: Batch, *, weight: float | Array) -> Array:
    """`weight` times the measure `from_old`, `[B G T]`.

    Raises:
      ValueError: the measure was not computed.
    """
    if "from_old" not in scores.extras:
        raise ValueError("kl_from_old needs scores.extras['from_old']: put `from_old` into the recipe's measures")
    return weight * masked(batch.mask, scores.extras["from_old"])


def polychromic(
    *,
    vines: int = 2,
    size: int = 8,
    sets: int = 4,
    members: int = 4,
    window: int | None = 5,
    alike: Callable[[Rollouts], Array] = same_tokens,
    clip: float = 0.2,
    gamma: float = 1.0,
    lam: float = 0.95,
    entropy: float | None = 0.01,
    kl: float | None = 0.01,
    epochs: int = 2,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` whose credit after some states is that of sets of continuations: their mean reward times their diversity.

    A member of a set that is right and varied has credit even if it failed itself, so exploration is kept.

    Source: "Polychromic Objectives for Reinforcement Learning", 2509.25424, Poly-PPO with vine sampling.
    Deviations: written from a digest and a replication; the official code was not found. A step is a token. Advantages
      are not whitened. Which responses are the same is for the task to say; two are, here, if their tokens are.
    Limit: window=0 and kl=None is `ppo` without whitening.
    Family: credit.

    Args:
      vines: p, states that are gone on from.
      size: N, continuations of each.
      sets: M, of each state.
      members: n, of a set.
      window: W, tokens after the state; None for the whole continuation.
      alike: `(Rollouts) -> [B G G]` bool: which rows are the same; a continuation's row holds what came before it.
      clip: both widths.
      gamma: discount a token.
      lam: of GAE.
      entropy: weight of the bonus; None or 0 for none.
      kl: weight of the divergence from the policy before the update; None or 0 for none.
      epochs: passes over a batch.
      minibatches: optimiser steps a pass.  # as in `ppo`

    Raises:
      ValueError: a set without or with too many members, or no set.
    """
    if not 1 <= members <= size or sets < 1:
        raise ValueError(f"polychromic: sets need 1 to {size} members and there must be one, got {members} and {sets}")
    parent = ppo(clip=clip, gamma=gamma, lam=lam, entropy=entropy, epochs=epochs, minibatches=minibatches)
    assert isinstance(parent.loss, PolicyLoss)
    sampled = partial(set_advantage, vines=vines, sets=sets, members=members, window=window, alike=alike)
    return replace(
        parent,
        rollout=partial(sample_vines, vines=vines, size=size),
        advantage=Stage(apply=partial(sampled, gamma=gamma, lam=lam)),
        loss=replace(parent.loss, terms=(*parent.loss.terms, *optional(kl_from_old, weight=kl))),
        measures={"from_old": from_old},
    )
