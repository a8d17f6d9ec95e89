"""MMR1: variance-aware sampling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.choose import kept, successes, take
from jaxrl_llm.prompts.diversity import distinct_ngrams
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Problem, Prompts, Stage

Scores = dict[str, Array]  # of each prompt [P]: the score in use, whether it has one, the sum and number of newer ones


def no_scores(problem: Problem) -> Scores:
    """No prompt has a score."""
    zero = jnp.zeros(problem.rows)
    return {"score": zero, "known": zero.astype(bool), "sum": zero, "count": zero}


def variance_and_diversity(batch: Batch, *, variance: float | Array, diversity: float | Array, n: int) -> Array:
    """`variance * p (1 - p) + diversity * distinct n-grams` of each prompt, `[B]` (the variance promotion score)."""
    right, rows = successes(batch)
    p = right / jnp.maximum(rows, 1)
    different = jax.vmap(partial(distinct_ngrams, n=n))(batch.rollouts.tokens, batch.mask)
    return variance * p * (1 - p) + diversity * different


def weights(memory: Scores) -> Array:
    """Scores as weights from 0 to 1, `[P]`; a prompt without a score has the mean. All 0 if all are equal."""
    score = jnp.where(memory["known"], memory["score"], masked_mean(memory["score"], memory["known"]))
    low, width = score.min(), score.max() - score.min()
    return (score - low) / jnp.where(width > 0, width, 1.0)


def partly_weighted(
    memory: Scores, key: Array, prompts: Prompts, *, share: float | Array, candidates: int
) -> tuple[Prompts, Scores]:
    """`share` of the prompts drawn by weight with replacement, rounded down; the rest are the first of the pool."""
    n, weight = kept(prompts, candidates), weights(memory)[prompts.index]
    weight = jnp.where(weight.any(), weight, 1.0)
    weighted = jax.random.categorical(key, jnp.log(weight), shape=(n,))
    rows = jnp.arange(n)
    # What is added keeps a product that should be whole from being rounded down.
    return take(prompts, jnp.where(rows < jnp.floor(share * n + 1e-4), weighted, rows)), memory


def measured(memory: Scores, batch: Batch, *, of: partial[Array], refresh: int, momentum: float | Array) -> Scores:
    """Collects this step's scores, and puts the means of what was collected to use every `refresh` steps."""
    index, some = batch.prompts.index, batch.rows.any(-1)
    total = memory["sum"].at[index].add(jnp.where(some, of(batch), 0.0))
    count, due = memory["count"].at[index].add(some), (batch.step + 1) % refresh == 0
    new, renewed = total / jnp.maximum(count, 1), due & (count > 0)
    mixed = jnp.where(memory["known"], momentum * memory["score"] + (1 - momentum) * new, new)
    return {
        "score": jnp.where(renewed, mixed, memory["score"]),
        "known": memory["known"] | renewed,
        "sum": jnp.where(due, 0.0, total),
        "count": jnp.where(due, 0.0, count),
    }


def mmr1_vas(
    *,
    group_size: int = 8,
    kl: float | None = 0.01,
    share: float = 0.5,
    candidates: int = 4,
    refresh: int = 28,
    momentum: float = 0.0,
    variance: float = 0.8,
    diversity: float = 0.2,
    ngram: int = 3,
) -> Algorithm:
    """`grpo` on prompts half of which are drawn by how much their outcomes vary and their responses differ.

    Source: "MMR1", 2509.21268 (variance-aware sampling), and its released code.
    Deviations: scores come from the rollouts that training makes anyway, not from rolling out the whole data set every
      `refresh` steps; prompts are drawn from those of the step; diversity is distinct n-grams of tokens (the paper also
      has self-BLEU).
    Limit: with share=0 and candidates=1 it is `grpo`.
    Family: sampling and curricula.

    Args:
      group_size: rollouts a prompt.
      kl: weight of the divergence in the loss.
      share: lambda, of the prompts that are drawn by weight.
      candidates: prompts drawn for each one answered; a step answers `B / candidates`.  # not in the paper
      refresh: steps between two updates of the scores.
      momentum: how much of the old score an update keeps.
      variance: alpha, weight of `p (1 - p)`.
      diversity: beta, weight of the share of different n-grams.
      ngram: their length.

    Raises:
      ValueError: an integer below 1.
    """
    if min(candidates, refresh, ngram) < 1:
        raise ValueError(f"mmr1_vas: {candidates=}, {refresh=} and {ngram=} must be at least 1")
    of = partial(variance_and_diversity, variance=variance, diversity=diversity, n=ngram)
    return replace(
        grpo(group_size=group_size, kl=kl),
        prompt=Stage(
            init=no_scores,
            apply=partial(partly_weighted, share=share, candidates=candidates),
            observe=partial(measured, of=of, refresh=refresh, momentum=momentum),
        ),
    )
