"""Template: copy to jaxrl_llm/algorithms/NAME.py, rename the function to NAME. One line: the paper's title or name."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.types import masked


# An equation that only this paper uses stands here, for one group or sequence: vmap makes the batch. With its second
# user it moves to the slot's folder (this one to advantages/). A recipe that needs none has no imports from jax.
def center_median(reward: Array, keep: Array) -> Array:
    """`R_i - median(R)` over the rows of a group that count, 0 elsewhere.

    Args:
      reward: `[G]`.
      keep: `[G]` bool.
    """
    return masked(keep, reward - jnp.nanmedian(jnp.where(keep, reward, jnp.nan)))


# Every argument is keyword-only and has the paper's default. A float is an argument of the compiled program: bind it,
# never branch on it. An int or a function is structure.
def template_recipe(*, group_size: int = 8, clip: float = 0.2) -> Algorithm:
    """`parent` that ...: what the method changes and why, in a sentence or two.

    Source: "Title", arXiv id, equations and sections used.
    Deviations: where this differs from the paper or its code, and why; "none known"; "described only in part".
    Limit: where it becomes another method ("groups of two: `grpo` without division by the standard deviation").
    Family: credit.

    Args:
      group_size: the paper's value, or `# not in the paper` behind ours.
      clip: both widths.

    Raises:
      ValueError: groups of fewer than two have no median to differ from.
    """
    if group_size < 2:
        raise ValueError(f"template_recipe needs group_size of at least 2, got {group_size}")
    return replace(grpo(group_size=group_size, clip=clip, kl=None), advantage=partial(per_group, center_median))
