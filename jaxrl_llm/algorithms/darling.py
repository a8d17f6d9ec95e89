"""DARLING: diversity-aware reinforcement learning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import row_reward
from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.meaning import Same, clusters, same_answer
from jaxrl_llm.types import Batch, masked


def distinctness(cluster: Array, keep: Array, *, floor: float | Array) -> Array:
    """The share of a group's other rows that mean something else, at least `floor`, `[G]`; 0 on rows that do not count.

    Args:
      cluster: `[G]` int.
      keep: `[G]` bool.
      floor: what the rows of a group in which all mean the same are left with.
    """
    others = keep & (cluster[:, None] != cluster)
    return masked(keep, jnp.maximum(others.sum(-1) / jnp.maximum(keep.sum() - 1, 1), floor))


def quality_times_diversity(batch: Batch, *, same: Same, floor: float | Array) -> Array:
    """The reward so far, the outcome if there is none, times `distinctness`, `[B G]`."""
    cluster = clusters(batch, same=same)
    return row_reward(batch) * jax.vmap(partial(distinctness, floor=floor))(cluster, batch.rows)


def darling(
    *,
    group_size: int = 8,
    clip: float = 0.2,
    kl: float | None = 0.001,
    same: Same = same_answer,
    floor: float = 0.1,
) -> Algorithm:
    """`grpo` whose reward is multiplied by how much a response differs in meaning from the others of its group.

    As a factor diversity pays only where there is quality: a wrong answer gets nothing for being different. Advantages
    are not divided by the standard deviation, which would amplify the noise of the classifier.

    Source: "Jointly Reinforcing Diversity and Quality in Language Model Generations", 2509.02534; released code.
    Deviations: which responses mean the same is asked of a trained classifier of pairs there, and is a function here;
      very short answers are not compared by shared words. A row is compared with those that count.
    Limit: where all responses differ it is `grpo` with `per_group(center)` and `token_mean`.
    Family: rewards and budgets.

    Args:
      group_size: responses a prompt.
      clip: both widths.  # not in the paper
      kl: weight of the divergence in the loss; the paper's for chat, None for mathematics.
      same: `(tokens [G T], mask [G T]) -> [G G]` bool, which responses mean the same; made transitive. Equal in every
        token if not given, which a space can break: `partial(same_answer, marker=ids)` compares what follows a marker,
        a classifier on the host is called with `jax.pure_callback`.
      floor: the least factor. The reward must not be negative, or repeating oneself is what pays.
    """
    return replace(
        grpo(group_size=group_size),
        reward=partial(quality_times_diversity, same=same, floor=floor),
        advantage=partial(per_group, center),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            aggregate=token_mean,
            terms=optional(kl_to_reference, weight=kl),
        ),
    )
