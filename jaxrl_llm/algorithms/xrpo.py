"""XRPO: rollouts where the outcome is uncertain, examples where nothing works, more credit for rare solutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.corpus import Corpus, Embed, empty_corpus, token_counts, with_examples, with_solved
from jaxrl_llm.rollouts.rounds import sample_in_rounds
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Context, Prompts, Rollouts, Stage, World, masked


def examples_if_failed(
    corpus: Corpus, prompts: Prompts, first: Rollouts, *, count: int, embed: Embed, between: tuple[int, ...]
) -> Context:
    """`[B 1 S]`: the prompts, after examples where not one of the first responses is right."""
    assert first.outcome is not None
    failed = ~jnp.isnan(first.outcome).all(-1) & ~(first.outcome > 0.5).any(-1)
    return with_examples(corpus, prompts, failed, count=count, embed=embed, between=between)


def explore(
    corpus: Corpus,
    key: Array,
    world: World,
    prompts: Prompts,
    *,
    base: int,
    rounds: int,
    mean: int,
    most: int,
    alpha: float | Array,
    bonus: float | Array,
    examples: Callable[..., Context],
) -> tuple[Rollouts, Corpus]:
    """`sample_in_rounds` with `examples` from the corpus."""
    sizes: dict[str, Any] = {"base": base, "rounds": rounds, "mean": mean, "most": most}
    context = partial(examples, corpus, prompts)
    return sample_in_rounds(world, key, prompts, **sizes, alpha=alpha, bonus=bonus, context=context), corpus


def sharpened(batch: Batch, *, weight: float | Array, most: float | Array, threshold: float | Array = 0.5) -> Array:
    """`A + min(max(weight * (1 - eta), 0), most * A)` of right rows, `A` of others, `[B G T]`.

    `eta = exp(s - mean of the group's s)`, with `s` a row's mean log-prob: below 1 where a row was unlikely.
    """
    assert batch.advantage is not None
    likely = masked_mean(batch.rollouts.logp, batch.mask, axis=-1)
    eta = jnp.exp(likely - masked_mean(likely, batch.rows, axis=-1, keepdims=True))
    bonus = jnp.minimum(jnp.maximum(weight * (1 - eta), 0.0)[..., None], most * batch.advantage)
    return batch.advantage + masked(batch.mask & (batch.outcome > threshold)[..., None], bonus)


def xrpo(
    *,
    group_size: int = 16,
    clip: float = 0.2,
    kl: float | None = None,
    base: int = 8,
    rounds: int = 2,
    most: int = 8,
    alpha: float = 0.05,
    bonus: float = 0.01,
    seeds: int = 2,
    sharpen: float = 2.5,
    sharpen_most: float = 0.5,
    corpus: int = 1024,
    embed: Embed = token_counts,
    between: tuple[int, ...] = (),
) -> Algorithm:
    """`grpo` that spends its rollouts where they say most, helps where all fail, and pays unlikely right answers more.

    Source: XRPO, 2510.06672.
    Deviations: known only in part; the bonus's form is inferred. Similarity is of token counts, not of an encoder.
      The corpus holds one solution a question. Seeded responses are learnt after their examples.
    Limit: with base=group_size, rounds=0 and sharpen=0 it is `grpo` with the same kl.
    Family: sampling and curricula.

    Args:
      group_size: responses a prompt, on average.
      clip: both widths.  # not in the paper
      kl: weight of the divergence from the reference; None or 0 for none.  # not in the paper
      base: responses to every prompt before the rounds.  # not in the paper
      rounds: in which the others are given out, the rewards being looked at before each.  # not in the paper
      most: responses to a prompt in a round.  # not in the paper
      alpha: 1 minus the level of the confidence interval.
      bonus: for prompts that were asked little.  # not in the paper
      seeds: examples before later responses where the first ones all failed.
      sharpen, sharpen_most: lambda of the bonus for unlikely right responses, and kappa, its bound in advantages.
      corpus: solved questions that are remembered.  # not in the paper
      embed: `(Context [N S]) -> [N D]`, of length 1.
      between: token ids after each example.  # not in the paper

    Raises:
      ValueError: sizes that do not fit each other.
    """
    extra = group_size - base
    if base < 2 or extra < 0 or (extra > 0 if rounds == 0 else extra % rounds or extra > rounds * most):
        given = f"group_size={group_size}, base={base}, rounds={rounds}, most={most}"
        raise ValueError(f"xrpo needs base >= 2 and group_size - base = rounds * (at most `most`), got {given}")
    sizes: dict[str, Any] = {"base": base, "rounds": rounds, "mean": extra // max(rounds, 1), "most": most}
    examples = partial(examples_if_failed, count=seeds, embed=embed, between=between)
    return replace(
        grpo(group_size=group_size, clip=clip, kl=kl),
        rollout=Stage(
            init=partial(empty_corpus, places=corpus, embed=embed),
            apply=partial(explore, **sizes, alpha=alpha, bonus=bonus, examples=examples),
            observe=partial(with_solved, embed=embed),
        ),
        advantage=chain(partial(per_group, center_scale), partial(sharpened, weight=sharpen, most=sharpen_most)),
    )
