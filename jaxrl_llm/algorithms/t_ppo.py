"""Truncated PPO: learning from responses before they end."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.gae import gae
from jaxrl_llm.advantages.returns import reward_to_go, token_rewards
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.losses.together import Together, valued
from jaxrl_llm.losses.value import value_loss
from jaxrl_llm.rewards.basic import at_last_token
from jaxrl_llm.rollouts.resume import buffer, resume, unfinished, unstarted
from jaxrl_llm.types import Batch, Problem, Prompts, Rollouts, Stage, World, masked


def empty_slots(problem: Problem) -> Rollouts:
    """A row for each prompt of a step, none of which is going on."""
    rows = buffer(problem, groups=problem.prompts, size=1)
    return replace(rows, truncated=jnp.zeros_like(rows.truncated))


def next_window(
    memory: Rollouts, key: Array, world: World, prompts: Prompts, *, window: int | None
) -> tuple[Rollouts, Rollouts]:
    """Every row gets at most `window` tokens; rows that ended before were replaced by new prompts.

    The policy learns from the tokens of this step, the critic from all tokens of the rows that have ended now.
    """
    window = -(-world.length // 3) if window is None else window
    new = unstarted(prompts, world.sampling, size=1, length=world.length)
    going = unfinished(memory)[:, 0]
    slots = jnp.arange(going.size)
    places = jnp.where(going, slots, slots + going.size)
    rows: Rollouts = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places], memory, new)
    longer = resume(world, key, rows, window=window)
    now, ended = longer.attended & ~rows.attended, ~unfinished(longer)
    outcome = masked(ended, world.reward(longer))
    learnt = replace(longer, mask=now, valued=longer.attended & ended[..., None], outcome=outcome)
    return replace(learnt, generated=now.sum((-2, -1), dtype=jnp.float32)), longer


def egae(batch: Batch, *, gamma: float = 1.0, lam: float = 0.95) -> Array:
    """`gae`, where a row that goes on is worth as much after its last token as before it, `[B G T]`.

    Raises:
      ValueError: there is no critic, or the reward slot has not run.
    """
    if batch.value is None:
        raise ValueError("egae needs batch.value: train with a critic (the engine adds it for recipes that read it)")
    going = unfinished(batch.rollouts) & batch.rows
    last = at_last_token(batch.mask, going.astype(jnp.float32)) > 0
    reward = masked(batch.mask, token_rewards(batch)) + masked(last, gamma * batch.value)
    return gae(replace(batch, token_reward=reward), gamma=gamma, lam=lam)


def t_ppo(
    *,
    window: int | None = None,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_weight: float = 1.0,
    gamma: float = 1.0,
    lam: float = 0.95,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` that writes a window of each response a step and learns from it at once, whether the response ended or not.

    Unfinished responses are judged by the critic and go on in the next step. The critic learns the outcome of finished
    ones, all their tokens in one mean of its own.

    Source: "Truncated Proximal Policy Optimization", 2506.15050: extended GAE, token filtering.
    Deviations: written from the abstract and reviews, which describe the method only in part. Whitening, the clipped
      critic's loss and its weight are those of `ppo`. One response a prompt.
    Limit: with a window as long as the budget its policy loss is that of `ppo`.
    Family: sampling and curricula.

    Args:
      window: tokens of a row a step; a third of the budget if None.  # not in the paper
      clip: both widths.  # not in the paper
      value_clip: how far the critic may move in a step.  # not in the paper
      value_weight: of the critic's loss.  # not in the paper
      gamma: discount a token.
      lam: of the extended GAE.
      epochs: passes over a batch.  # not in the paper
      minibatches: optimiser steps a pass.  # not in the paper

    Raises:
      ValueError: `window` is below 1.
    """
    if window is not None and window < 1:
        raise ValueError(f"t_ppo: window must be at least 1 token, got {window}")
    return replace(
        ppo(epochs=epochs, minibatches=minibatches),
        rollout=Stage(init=empty_slots, apply=partial(next_window, window=window)),
        advantage=chain(partial(egae, gamma=gamma, lam=lam), whiten),
        loss=Together(
            loss=PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip)),
            terms=(
                partial(value_loss, returns=partial(reward_to_go, gamma=gamma), weight=value_weight, clip=value_clip),
            ),
            tokens=valued,
        ),
    )
