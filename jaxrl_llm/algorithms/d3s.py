"""D3S: dynamic dual-level down-sampling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.stats import centered, largest, masked_mean
from jaxrl_llm.types import Batch, masked

Number = float | Array


def widest(credit: Array, keep: Array, size: int | Array) -> Array:
    """`[M]` bool: the `size` rows with the largest variance of credit; of equal rows the first.

    They are the `h` largest and the `size - h` smallest for some `h`: one sort, and sums over all `h`.
    """
    there = keep.sum()
    size = jnp.minimum(size, there)
    high = jnp.arange(credit.size + 1)
    x = jnp.sort(jnp.where(keep, centered(credit, keep), jnp.inf))
    x = masked(jnp.arange(credit.size) < there, x)

    def total(x: Array) -> Array:
        ends = jnp.append(0.0, jnp.cumsum(x))
        return ends[jnp.clip(size - high, 0)] + ends[there] - ends[jnp.clip(there - high, 0)]

    n = jnp.maximum(size, 1)
    variance = jnp.where(high <= size, total(jnp.square(x)) / n - jnp.square(total(x) / n), -jnp.inf)
    # Choices that differ by rounding are the same choice.
    h = jnp.argmax(variance >= variance.max() - 1e-5 * jnp.abs(variance.max()))
    top = largest(credit, keep, h)
    return top | largest(-credit, keep & ~top, size - h)


def during(batch: Batch, start: Number, end: Number, steps: int) -> Array:
    """`(1 - p) * start + p * end`, `p` from 0 to 1 over `steps` optimiser steps, `[]`."""
    p = jnp.clip(batch.step / steps, 0.0, 1.0)
    return (1 - p) * start + p * end


def advantages(batch: Batch) -> Array:
    """`[B G T]`: `batch.advantage`.

    Raises:
      ValueError: no advantage was computed before.
    """
    if batch.advantage is None:
        raise ValueError("d3s chooses by batch.advantage: put it in the weight slot, which runs after the advantage")
    return batch.advantage


def rows_with_variance(batch: Batch, *, each: int, start: Number, end: Number, steps: int) -> Array:
    """`[B G]` bool: the widest `each` rows of every group, and of these the widest share of `B * G`."""
    credit, keep = masked_mean(advantages(batch), batch.mask, axis=-1), batch.rows
    within = jax.vmap(partial(widest, size=each))(credit, keep)
    size = jnp.round(during(batch, start, end, steps) * keep.size).astype(jnp.int32)
    return widest(credit.ravel(), within.ravel(), size).reshape(keep.shape)


def tokens_with_entropy(batch: Batch, *, start: Number, end: Number, steps: int) -> Array:
    """`[B G T]` bool: of the tokens still selected the share with the largest `|A| * H`, at least one."""
    score = jnp.abs(advantages(batch)) * masked(batch.mask, batch.rollouts.entropy)
    count = jnp.round(during(batch, start, end, steps) * batch.mask.sum()).astype(jnp.int32)
    return largest(score, batch.mask, jnp.maximum(count, 1))


def d3s(
    *, group_size: int = 8, clip: float = 0.2, kl: float | None = 0.04, each: int = 4, rows_start: float = 0.125,
    rows_end: float = 0.5, tokens_start: float = 0.2, tokens_end: float = 1.0, steps: int = 1000,
) -> Algorithm:  # fmt: skip
    """`grpo` on the rows whose advantages vary most and the tokens with most entropy and advantage, ever less strictly.

    Advantages are those of whole groups: scaling them again would undo the choice.

    Source: "Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy Optimization",
      2509.22115.
    Deviations: the account used here is partial: it has the equations but not the authors' sizes. The entropy is that
      of the sampling distribution, which costs nothing.
    Limit: with each=group_size and all shares 1 it is `grpo` with `token_mean`.
    Family: sampling and curricula.

    Args:
      group_size: rows of a group.
      clip: both widths.
      kl: weight of the divergence in the loss.
      each: rows kept of a group.  # not in the paper
      rows_start, rows_end: share of all the step's rows kept across groups.  # not in the paper
      tokens_start, tokens_end: share of the tokens of these rows.  # not in the paper
      steps: length of the schedule, in steps of the run.  # not in the paper

    Raises:
      ValueError: no schedule, or more rows than a group has.
    """
    if steps < 1 or not 1 <= each <= group_size:
        raise ValueError(f"d3s needs steps of at least 1 and each of 1 to group_size={group_size}: {steps=}, {each=}")
    parent = grpo(group_size=group_size, clip=clip, kl=kl)
    assert isinstance(parent.loss, PolicyLoss)
    return replace(
        parent,
        weight=chain(
            partial(rows_with_variance, each=each, start=rows_start, end=rows_end, steps=steps),
            partial(tokens_with_entropy, start=tokens_start, end=tokens_end, steps=steps),
        ),
        loss=replace(parent.loss, aggregate=token_mean),
    )
