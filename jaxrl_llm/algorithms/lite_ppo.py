"""Lite PPO: two tricks on a critic-free PPO."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.stats import masked_var
from jaxrl_llm.types import Batch


def group_mean_batch_std(batch: Batch, *, eps: float | Array = 1e-6) -> Array:
    """`(R_i - mean of its group) / (std of all rewards + eps)`, `[B G T]`: one scale for the whole batch."""
    reward, rows = row_reward(batch), batch.rows
    deviation: Array = jax.vmap(center)(reward, rows)
    return over_tokens(batch, deviation / (jnp.sqrt(masked_var(reward, rows)) + eps))


def lite_ppo(*, group_size: int = 8, clip: float = 0.2, eps: float = 1e-6) -> Algorithm:
    """`grpo` with the batch's standard deviation and the token mean. No divergence.

    A group's own deviation is tiny on easy prompts, and dividing by it makes noise loud.

    Source: "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning", 2508.08221 (Lite PPO).
    Deviations: groups that a filter drops do not enter the deviation.
    Limit: with one group a batch it is `grpo` with kl=None and `token_mean`.
    Family: policy gradient.

    Args:
      group_size: rollouts a prompt.
      clip: both widths.
      eps: added to the deviation.  # not in the paper
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=partial(group_mean_batch_std, eps=eps),
        loss=PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=token_mean),
    )
