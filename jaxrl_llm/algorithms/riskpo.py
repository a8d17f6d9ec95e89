"""RiskPO: mixed value-at-risk of bundles."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages import bundles
from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.types import Batch, Problem, Stage, masked
from jaxrl_llm.updates.passes import several_passes

Number = float | Array
Tracker = dict[str, Array]  # "bounds" [2]: the quantiles of all steps' papers; "known" []: whether there were any


def value_at_risk(
    score: Array, bounds: Array, levels: Array, *, tail: Number, natural: bool, eps: Number = 1e-6
) -> Array:
    """`(tail * below + above) / (tail + 1)`, `[G]`: how far scores lie under the lower bound and between the two."""
    low, high = bounds
    above = jax.nn.relu(score - low) - jax.nn.relu(score - high) + (low - high if natural else 0.0)
    below = -jax.nn.relu(low - score)
    return (tail * below / (levels[0] + eps) + above / (levels[1] - levels[0] + eps)) / (tail + 1)


def of_papers(
    papers: bundles.Papers,
    tracker: Tracker,
    levels: Array,
    *,
    which: bundles.Which,
    split: bundles.Split,
    risk: Any,
    eps: Number = 1e-6,
) -> Array:
    """The credit of a bundle's responses, `[K G]`: their paper's, over the deviation of papers, split among them."""
    score, exist = papers.score, papers.exist
    own = bundles.quantiles(score, exist, levels)
    bounds = which(own, jnp.where(tracker["known"], tracker["bounds"], own))
    std = jnp.sqrt(masked_var(score, exist))
    credit = masked(exist, risk(score, bounds, levels) / (jnp.where(std > 1e-3, std, 1.0) + eps))
    return bundles.as_sampled(split(credit, papers), papers)


def by_bundle(
    memory: Tracker, key: Array, batch: Batch, *, size: int, low: Number, high: Number, **how: Any
) -> tuple[Array, Tracker]:
    """The credit of all bundles of `size` prompts, `[B G T]`."""
    papers = bundles.of_bundles(row_reward(batch), batch.rows, size)
    levels = jnp.stack([low, high])
    credit = jax.vmap(lambda p: of_papers(p, memory, levels, **how))(papers)
    return over_tokens(batch, credit.reshape(-1, credit.shape[-1])[: batch.rows.shape[0]]), memory


def tracked(memory: Tracker, batch: Batch, *, size: int, low: Number, high: Number, rate: Number) -> Tracker:
    """`q + rate * (level - share of papers below q)`; the papers' own quantiles the first time."""
    papers, levels = bundles.of_bundles(row_reward(batch), batch.rows, size), jnp.stack([low, high])
    score, exist = jax.vmap(lambda p: (p.score, p.exist))(papers)
    score, exist, old = score.ravel(), exist.ravel(), memory["bounds"]
    below = jax.vmap(lambda q: masked_mean(1.0 * (score < q), exist))(old)
    new = jnp.where(memory["known"], old + rate * (levels - below), bundles.quantiles(score, exist, levels))
    return {"bounds": jnp.where(exist.any(), new, old), "known": memory["known"] | exist.any()}


def no_papers(problem: Problem) -> Tracker:
    """No quantile is known."""
    return {"bounds": jnp.zeros(2), "known": jnp.zeros((), bool)}


def riskpo(
    *, group_size: int = 10, clip: float = 0.2, bundle: int = 5, low: float = 0.2, high: float = 0.8, tail: float = 1.5,
    natural: bool = False, split: bundles.Split = bundles.by_deviation, which: bundles.Which = bundles.of_bundle,
    rate: float = 0.1, minibatches: int = 1,
) -> Algorithm:  # fmt: skip
    """Policy gradient of a risk-averse objective: of bundles of questions, the low scores have most of the gradient.

    Source: "RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training", 2510.00911, and its
      released code; the defaults are those of its script for hard problems (easy: group_size=5, high=0.9,
      natural=True, split=over_deviation).
    Deviations: those scripts ask for tracked quantiles, but the released code never reads what it tracked: its runs
      used the bundle's own, as here. Papers with equal scores have deviation 1 (there 0, and credit divided by 1e-6
      with tracked quantiles). The last bundle may be smaller. Widths of the clip and the aggregation are `grpo`'s.
    Limit: low=0, high=1 and tail=0 make a paper's credit linear in its score: the mean, without risk. With bundle=1
      it then is `grpo` with kl=None and the group's lowest reward in place of its mean.
    Family: credit.

    Args:
      group_size: 10 in the paper.
      clip: both widths.  # not in the paper
      bundle: questions of one bundle, neighbours in the batch.
      low, high: levels of the quantiles.
      tail: weight of the part below the lower quantile; 0 for the range alone.
      natural: whether nothing is above 0: responses are only pushed down, the best of them least.
      split: `(credit [G], Papers) -> [K G]`: `by_deviation`, `over_deviation` or `same`.
      which: quantiles: `of_bundle`, `of_history`, or `between`.
      rate: of the tracked quantiles.
      minibatches: optimiser steps a batch; 4 in the paper.  # 1: the clip acts from the second on

    Raises:
      ValueError: an empty bundle.
    """
    if bundle < 1:
        raise ValueError(f"riskpo: a bundle needs at least 1 question, got {bundle}")
    same: dict[str, Any] = {"size": bundle, "low": low, "high": high}
    risk = partial(value_at_risk, tail=tail, natural=natural)
    credit = partial(by_bundle, **same, which=which, split=split, risk=risk)
    advantage = Stage(init=no_papers, apply=credit, observe=partial(tracked, **same, rate=rate))
    update = partial(several_passes, minibatches=minibatches)
    return replace(grpo(group_size=group_size, clip=clip, kl=None), advantage=advantage, update=update)
