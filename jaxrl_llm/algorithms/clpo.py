"""CLPO: curriculum-guided learning, with prompts that the policy words anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.filters.basic import informative
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.prompts.solution import solution
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.rollouts.rewrite import HARD, MEDIUM, difficulty, rewritten, sample_and_rewrite
from jaxrl_llm.types import Batch, Prompts, Scores
from jaxrl_llm.updates.passes import several_passes


def instruction(level: Array, *, paraphrase: tuple[int, ...], simplify: tuple[int, ...]) -> tuple[Array, Array]:
    """Tokens and mask `[B L]`: the ids `simplify` for hard prompts, `paraphrase` for others."""
    width = max(len(paraphrase), len(simplify))
    ids = jnp.array([(*x, *[0] * (width - len(x))) for x in (paraphrase, simplify)], jnp.int32)
    row = (level == HARD).astype(jnp.int32)
    return ids[row], jnp.arange(width) < jnp.array([len(paraphrase), len(simplify)])[row][:, None]


def informative_or_all(batch: Batch) -> Array:
    """`[B G]` bool: rows of groups with right and wrong ones; every row if there is no such group."""
    some = informative(batch)
    return some | ~some.any()


def kl_by_difficulty(
    scores: Scores, batch: Batch, *, weight: float | Array, scale: float | Array, hard: float | Array
) -> Array:
    """`kl_to_reference`, times `scale` on rows of hard prompts: by `rollouts.segment`, or by accuracy without it."""
    level = batch.rollouts.segment
    if level is None:
        level = difficulty(batch.outcome, batch.rows, hard=hard, medium=1.0)[:, None, None]
    return jnp.where(level == HARD, scale, 1.0) * kl_to_reference(scores, batch, weight=weight)


def clpo(
    *,
    group_size: int = 4,
    clip: float = 0.2,
    kl: float | None = 0.001,
    hard: float = 0.3,
    medium: float = 0.7,
    rewrite_hard: bool = True,
    rewrite_medium: bool = True,
    hard_kl: float = 0.5,
    paraphrase: tuple[int, ...] = (),
    simplify: tuple[int, ...] = (),
    frame: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
    answer: Callable[[Prompts], tuple[Array, Array]] = solution,
    length: int = 400,
    temperature: float = 0.7,
    minibatches: int = 8,
) -> Algorithm:
    """`grpo` on informative groups, after the policy itself reworded medium prompts and simplified hard ones.

    A rewritten prompt has the same answer and a group of its own; on hard ones the policy may move further.

    Source: CLPO, 2509.25004, and its released trainer.
    Deviations: the wording is token ids that the user gives; the instruction should forbid to reveal the answer, and
      whether it does is for the user to look at. The loss weighs rows equally. No group is split or cut.
    Limit: with neither kind rewritten and hard_kl=1 it is `grpo` with kl=0.001 and the filter.
    Family: sampling and curricula.

    Args:
      group_size: responses a prompt and a version.
      clip: both widths.  # not in the paper
      kl: weight of the divergence from the reference; None or 0 for none.
      hard: accuracy up to which a prompt is hard.
      medium: accuracy up to which it is medium.
      rewrite_hard: whether hard prompts are simplified.
      rewrite_medium: whether medium prompts are paraphrased.
      hard_kl: factor of the divergence's weight on hard prompts, as they were and rewritten.
      paraphrase: ids of the instruction after a medium prompt and its answer.  # () not in the paper
      simplify: ids of that after a hard prompt and its answer.  # () not in the paper
      frame: ids before and after a rewritten prompt, as a template has them.  # empty: not in the paper
      answer: `(prompts) -> tokens and mask [B 1 L]`, what the rewriter is told; the logged solution by default.
      length: of a rewritten prompt, in tokens.
      temperature: of the rewriter.
      minibatches: optimiser steps a batch; twice the prompts must divide into them.
    """
    levels = (MEDIUM,) * rewrite_medium + (HARD,) * rewrite_hard
    again = partial(
        sample_and_rewrite,
        size=group_size,
        difficulty=partial(difficulty, hard=hard, medium=medium),
        levels=levels,
        instruction=partial(instruction, paraphrase=paraphrase, simplify=simplify),
        answer=answer,
        rewrite=partial(rewritten, frame=frame, length=length, temperature=temperature),
    )
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=again if levels else partial(sample_group, size=group_size),
        filter=informative_or_all,
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            aggregate=sequence_mean_token_mean,
            terms=optional(kl_by_difficulty, weight=kl, scale=hard_kl, hard=hard),
        ),
        update=partial(several_passes, minibatches=minibatches),
    )
