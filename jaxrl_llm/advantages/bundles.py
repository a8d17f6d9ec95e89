"""Credit of bundles: questions answered together, whose summed scores have a distribution (RiskPO, 2510.00911).

Response `j` to every question of a bundle makes paper `j`. A bundle has as many papers as its question with the fewest
responses that count; later responses have credit 0. A question without any takes no part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.types import masked


class Papers(NamedTuple):
    """Of one bundle of `K` questions: responses that count come first in each row."""

    reward: Array  # [K G]
    there: Array  # [K G] bool: counts
    valid: Array  # [K G] bool: is part of a paper
    order: Array  # [K G] int: where each response stood

    @property
    def score(self) -> Array:
        """`[G]`: the sum over questions of each paper."""
        return masked(self.valid, self.reward).sum(0)

    @property
    def exist(self) -> Array:
        """`[G]` bool."""
        return self.valid.any(0)


Which = Callable[[Array, Array], Array]
Split = Callable[[Array, Papers], Array]


def papers_of(reward: Array, keep: Array) -> Papers:
    """The papers of a bundle, from `[K G]` rewards and the responses that count."""
    order = jnp.argsort(~keep, axis=-1, stable=True)
    reward, there = jnp.take_along_axis(reward, order, -1), jnp.take_along_axis(keep, order, -1)
    count = there.sum(-1)
    papers = jnp.min(count, where=count > 0, initial=keep.shape[-1])
    return Papers(reward, there, there & (jnp.arange(keep.shape[-1]) < papers), order)


def as_sampled(x: Array, papers: Papers) -> Array:
    """`[K G]` of a bundle's papers, back where the responses stood; 0 for responses in no paper."""
    return jnp.take_along_axis(masked(papers.valid, x), jnp.argsort(papers.order, axis=-1), -1)


def bundled(x: Array, size: int) -> Array:
    """`[B G] -> [bundles size G]`: consecutive prompts; the last bundle is filled up with zeros."""
    rows = -(-x.shape[0] // size) * size
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0))).reshape(-1, size, x.shape[1])


def quantiles(x: Array, keep: Array, levels: Array) -> Array:
    """`[levels]`: quantiles of `x [M]` where `keep`, by linear interpolation; 0 if there is nothing."""
    count = keep.sum()
    ordered = jnp.sort(jnp.where(keep, x, jnp.inf))
    place = levels * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
    return jnp.where(count > 0, low + (place - below) * (high - low), 0.0)


def of_bundle(own: Array, tracked: Array) -> Array:
    """The quantiles of the bundle's own papers."""
    return own


def of_history(own: Array, tracked: Array) -> Array:
    """The tracked quantiles."""
    return tracked


def between(own: Array, tracked: Array) -> Array:
    """The mean of both."""
    return (own + tracked) / 2


def over_deviation(credit: Array, papers: Papers, *, eps: float | Array = 1e-6) -> Array:
    """A paper's credit to each of its responses, over the deviation of the question's rewards, `[K G]`.

    Deviations of at most 1e-3 count as 1.
    """
    std = jnp.sqrt(masked_var(papers.reward, papers.there, axis=-1, keepdims=True))
    return credit / (jnp.where(std > 1e-3, std, 1.0) + eps)


def by_deviation(credit: Array, papers: Papers) -> Array:
    """A paper's credit in proportion to each response's distance from its question's mean, `[K G]`.

    The parts sum to the credit. Distances that sum to 0 make equal parts.
    """
    mean = masked_mean(papers.reward, papers.there, axis=-1, keepdims=True)
    distance = masked(papers.valid, papers.reward - mean)
    total, questions = distance.sum(0), jnp.maximum(papers.valid.sum(0), 1)
    even = jnp.abs(total) <= 1e-6
    return jnp.where(even, credit / questions, credit * distance / jnp.where(even, 1.0, total))


def same(credit: Array, papers: Papers) -> Array:
    """A paper's credit to each of its responses, `[K G]`."""
    return jnp.broadcast_to(credit, papers.reward.shape)


def of_bundles(x: Array, keep: Array, size: int) -> Papers:
    """`papers_of` every bundle of `[B G]`; leaves `[bundles size G]`."""
    return jax.vmap(papers_of)(bundled(x, size), bundled(keep, size))
