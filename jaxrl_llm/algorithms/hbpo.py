"""HBPO: hierarchical budget policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.contexts import extend
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Prompts, Rollouts, World

Budgets = tuple[int, ...]
Number = float | Array


def sample_budgets(
    world: World, key: Array, prompts: Prompts, *, each: int, budgets: Budgets, sentences: tuple[tuple[int, ...], ...]
) -> Rollouts:
    """`each` responses to every budget, `[B G T]`, a budget's rows together; its sentence stands behind the prompt."""
    context = None
    if sentences:
        width = max(map(len, sentences))
        tokens = jnp.array([(*s, *[0] * (width - len(s))) for s in sentences], jnp.int32)
        there = jnp.arange(width) < jnp.array([[len(s)] for s in sentences])
        context = extend(jax.tree.map(lambda x: x[:, None], prompts.context), (tokens, there))
    return world.sample(key, prompts, each * len(budgets), context=context)


def of_rows(size: int, budgets: Budgets) -> Array:
    """`[G]` float32: the budget of each row."""
    return jnp.repeat(jnp.array(budgets, jnp.float32), size // len(budgets), total_repeat_length=size)


def at_budget(budget: Array, *, longest: int, beta: Number) -> Array:
    """What a right answer within its budget is paid: `beta * cos(pi b / 2 L)`."""
    return beta * jnp.cos(jnp.pi * budget / (2 * longest))


def within_budget(batch: Batch, *, budgets: Budgets, longest: int, beta: Number, threshold: Number = 0.5) -> Array:
    """`[B G]`: `at_budget` up to the budget; beyond it `beta * cos(pi n / 2 L) - |n - b| / L`; 0 if wrong or over L."""
    length = batch.rollouts.lengths.astype(jnp.float32)
    budget = of_rows(length.shape[-1], budgets)
    beyond = at_budget(length, longest=longest, beta=beta) - jnp.abs(length - budget) / longest
    paid = jnp.where(length <= budget, at_budget(budget, longest=longest, beta=beta), beyond)
    return jnp.where((batch.outcome > threshold) & (length <= longest), paid, 0.0)


def between_and_within(reward: Array, keep: Array, *, budgets: Budgets, longest: int, beta: Number) -> Array:
    """Of one group, `[G]`: what its budget earns on average less what it could, plus its standing in the group."""
    rows, kept = reward.reshape(len(budgets), -1), keep.reshape(len(budgets), -1)
    could = at_budget(jnp.array(budgets, jnp.float32), longest=longest, beta=beta)
    budget = jnp.broadcast_to((masked_mean(rows, kept, axis=-1) - could)[:, None], rows.shape)
    return budget.ravel() + center_scale(reward, keep)


def by_budget(batch: Batch, *, budgets: Budgets, longest: int, beta: Number) -> Array:
    """`between_and_within` over all groups, `[B G T]`."""
    fn = partial(between_and_within, budgets=budgets, longest=longest, beta=beta)
    return over_tokens(batch, jax.vmap(fn)(row_reward(batch), batch.rows))


def hbpo(
    *, each: int = 4, budgets: Budgets = (512, 1024, 2048, 2560), sentences: tuple[tuple[int, ...], ...] = (),
    longest: int = 4096, beta: float = 4.0, clip_low: float = 0.2, clip_high: float = 0.28,
) -> Algorithm:  # fmt: skip
    """`grpo` in whose groups some rows are told to be short: lengths stay diverse, and problems choose theirs.

    Source: "Hierarchical Budget Policy Optimization for Adaptive Reasoning", 2507.15844. The reward is the paper's,
      piecewise; the released code takes the smaller of both pieces everywhere.
    Deviations: the released code adds the advantage between budgets twice; here it counts once. The sentence is part
      of the context, not of the response, so it is neither learnt nor counted. Without `sentences` no row is told its
      budget, which is not the method: they are token ids, and a recipe has no tokenizer. The loss is a token mean.
    Limit: with one budget that no row exceeds it is `grpo` with a constant added to a group's advantages.
    Family: rewards and budgets.

    Args:
      each: rows of a budget; 4 of 16 in the paper.
      budgets: tokens.
      sentences: for each budget the ids of "I will answer the question within b tokens", at the start of the thinking.
      longest: L, tokens; longer answers earn nothing.
      beta: scale of the reward.
      clip_low, clip_high: widths.

    Raises:
      ValueError: no budget, no rows, or not one sentence a budget.
    """
    if not budgets or each < 1 or len(sentences) not in (0, len(budgets)):
        raise ValueError(f"hbpo needs budgets, rows and one sentence a budget: {budgets=}, {each=}, {len(sentences)=}")
    same: dict[str, Any] = {"budgets": budgets, "longest": longest, "beta": beta}
    return replace(
        grpo(group_size=each * len(budgets), kl=None),
        rollout=partial(sample_budgets, each=each, budgets=budgets, sentences=sentences),
        reward=partial(within_budget, **same),
        advantage=partial(by_budget, **same),
        loss=PolicyLoss(surrogate=partial(clip_min, low=clip_low, high=clip_high), aggregate=token_mean),
    )
