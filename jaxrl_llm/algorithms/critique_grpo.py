"""Critique-GRPO: a second attempt after a critique joins the group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.dr_grpo import dr_grpo
from jaxrl_llm.contexts import extend
from jaxrl_llm.losses.aggregate import token_sum_over
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.shaped import shaped_ratio
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.prompts.solution import solution
from jaxrl_llm.rollouts.inject import best_row, injected, with_row
from jaxrl_llm.types import Prompts, Rollouts, World, split

Critique = Callable[[Prompts, Array], tuple[Array, Array]]


def right_answer(prompts: Prompts, outcome: Array) -> tuple[Array, Array]:
    """Tokens and mask `[B 1 L]`: the logged solution, whatever the outcome `[B G]` was."""
    return solution(prompts)


def verdict(
    prompts: Prompts, outcome: Array, *, right: tuple[int, ...], wrong: tuple[int, ...], threshold: float | Array = 0.5
) -> tuple[Array, Array]:
    """Tokens and mask `[B G L]`: the token ids `right` or `wrong`, by the outcome. It reveals no answer."""
    width = max(len(right), len(wrong))
    ids = jnp.array([(*w, *[0] * (width - len(w))) for w in (wrong, right)], jnp.int32)
    there = jnp.arange(width) < jnp.array([[len(wrong)], [len(right)]])
    row = (outcome > threshold).astype(jnp.int32)
    return ids[row], there[row]


def sample_and_refine(
    world: World, key: Array, prompts: Prompts, *, size: int, critique: Critique, keep_wrong: bool
) -> Rollouts:
    """`size` responses, of which the first gives its place to the best of `size` refinements, one of each response.

    A refinement is sampled after prompt, response and critique, and scored under the prompt alone.
    """
    keys = split(key, "first", "second")
    first = world.sample(keys["first"], prompts, size)
    first = replace(first, outcome=(outcome := world.reward(first)))
    context = extend(first.context, (first.tokens, first.attended), critique(prompts, outcome))
    second = world.sample(keys["second"], prompts, size, context=context)
    second = replace(injected(second), outcome=(refined := world.reward(second)))
    best = best_row(second)
    right = jnp.take_along_axis(refined, best[:, None], axis=1)[:, 0] > 0.5
    sampled = (first.mask.sum((1, 2)) + second.mask.sum((1, 2))).astype(jnp.float32)
    return replace(with_row(first, second, best, where=None if keep_wrong else right), generated=sampled)


def critique_grpo(
    *,
    group_size: int = 8,
    gamma: float = 0.1,
    entropy: float | None = 0.001,
    critique: Critique = right_answer,
    credit: Callable[[Array, Array], Array] = center,
    keep_wrong: bool = True,
    max_length: int | None = None,
) -> Algorithm:
    """`dr_grpo` without clip, in whose groups one row is a second attempt made after a critique.

    The refinement is learnt in the plain context, where it may be unlikely, with the shaped weight of LUFFY.

    Source: "Critique-GRPO", 2506.03106; shaping of LUFFY, 2504.14945.
    Deviations: the loss is the mean over rows of a sum of tokens over the budget; the released code sums over rows. The
      entropy bonus has the same denominator. A critique is made of tokens that are known, not written by another
      model; the default is the solution alone, where the paper's also says whether the response was right.
    Limit: if no row is injected (and entropy=None) it is `dr_grpo` with the `unclipped` surrogate.
    Family: supervised and mixed data.

    Args:
      group_size: rows of a group, the refinement among them; twice as many are sampled.
      gamma: of the shaping.
      entropy: weight of the bonus; None or 0 for none.
      critique: `(prompts, outcome [B G]) -> (tokens, mask)`, `[B 1 L]` or `[B G L]`, read after prompt and response.
      credit: of a group; `center_scale` is what the released trainer computes, against the paper's formula.
      keep_wrong: whether a refinement that is not right takes its place too, as in the released code.
      max_length: the denominator of the loss a row, in tokens; the generation budget if None, as there.
    """
    return replace(
        dr_grpo(group_size=group_size),
        rollout=partial(sample_and_refine, size=group_size, critique=critique, keep_wrong=keep_wrong),
        advantage=partial(per_group, credit),
        loss=PolicyLoss(
            ratio=partial(shaped_ratio, gamma=gamma),
            surrogate=unclipped,
            aggregate=partial(token_sum_over, constant=max_length),
            terms=optional(entropy_bonus, weight=entropy),
        ),
    )
