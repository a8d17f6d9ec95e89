"""Flow of reasoning: trajectory balance."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import raw, row_reward
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.group import GroupLoss, sequence_logp
from jaxrl_llm.rollouts.replay import with_replay
from jaxrl_llm.rollouts.tempered import sample_tempered
from jaxrl_llm.stats import masked_mean, masked_var
from jaxrl_llm.types import Batch, LossStage, Memory, Metrics, Problem, Scores, masked


def log_reward(
    batch: Batch, *, beta: float | Array, final_beta: float | Array, horizon: float | Array, floor: float | Array
) -> Array:
    """`b log(max(R, 0) + floor)`, `[B G]`, `b` going linearly from `beta` to `final_beta` over `horizon` steps."""
    exponent = beta + (final_beta - beta) * jnp.clip(batch.step / horizon, 0.0, 1.0)
    return exponent * jnp.log(jnp.maximum(batch.outcome, 0.0) + floor)


def var_grad(logp: Array, log_reward: Array, rows: Array) -> Array:
    """The variance of `log pi(y) - log R` over a group, `[G] -> []`: its mean stands for `-log Z`."""
    return masked_var(logp - log_reward, rows, ddof=0)


VAR_GRAD = GroupLoss(objective=var_grad, score=sequence_logp)


def residual(memory: Memory, scores: Scores, batch: Batch) -> Array:
    """`log Z + log pi(y) - log R`, `[B G]`."""
    return masked(batch.rows, memory["log_z"] + sequence_logp(scores, batch) - row_reward(batch))


def squared_residual(memory: Memory, key: Array, scores: Scores, batch: Batch) -> tuple[tuple[Array, Metrics], Memory]:
    """The mean over rows."""
    assert batch.share is not None
    missing = residual(memory, scores, batch)
    return (jnp.sum(batch.share.sum(-1) * jnp.square(missing)), {"log_z": memory["log_z"] * batch.share.sum()}), memory


def _first_log_z(problem: Problem, *, start: float | Array) -> Memory:
    """One number for all prompts."""
    return {"log_z": jnp.asarray(start, jnp.float32)}


def _learn_log_z(memory: Memory, batch: Batch, *, rate: float | Array) -> Memory:
    """A step down the gradient of the mean squared residual, at the policy before its update."""
    if batch.old is None:
        raise ValueError("a learned log Z needs batch.old (the engine adds it for recipes that read it)")
    return {"log_z": memory["log_z"] - rate * 2 * masked_mean(residual(memory, batch.old, batch), batch.rows)}


def learned_z(*, start: float = 5.0, rate: float = 1e-5) -> LossStage:
    """The mean over rows of `(log Z + log pi(y) - log R)^2`, with one log Z for all prompts, learnt by plain descent.

    Args:
      start: the first log Z.
      rate: its learning rate; the policy's is the optimiser's.
    """
    return LossStage(
        apply=squared_residual,
        init=partial(_first_log_z, start=start),
        observe=partial(_learn_log_z, rate=rate),
        aggregate=sequence_mean_token_mean,
    )


def for_tb(
    *,
    group_size: int = 4,
    beta: float = 1.0,
    final_beta: float = 2.0,
    floor: float = 1e-3,
    temperature: float = 2.0,
    chance: float = 0.5,
    horizon: float = 1000.0,
    replay: int = 0,
    balance: GroupLoss | LossStage = VAR_GRAD,
) -> Algorithm:
    """Answers are to be as probable as their reward is high, instead of the best one alone: trajectory balance.

    The squared difference of `log pi(y)` and `log R(y) - log Z`, whatever wrote the answer; tokens are summed.

    Source: "Flow of Reasoning", 2406.05673, trajectory balance, for text without a list of legal actions.
    Deviations: no local search (16 proposals in the paper), no epsilon-greedy actions, no reward for likelihood. Rows
      are drawn hot, and prompts replayed, each by its own chance. What is annealed goes linearly over a fixed horizon.
    Limit: on samples of the policy the expected gradient is `2 (G - 1) / G` times that of KL(pi || R^beta / Z): that of
      REINFORCE with the group's mean as baseline and `2 (beta log R - log pi)` as reward.
    Family: objective and clipping.

    Args:
      group_size: 4 in the paper.
      beta: exponent of the reward at the start.
      final_beta: its exponent after `horizon` steps.
      floor: added to every reward, so that it has a logarithm.  # not in the paper as a number
      temperature: of the rows drawn hot; it falls to 1 over `horizon` steps.
      chance: of a row to be drawn hot.
      horizon: steps.  # not in the paper
      replay: answers remembered for each prompt, of which half of the prompts learn; 50 in the paper, 0 for none, as
        the memory is `[P replay T]` tokens.
      balance: `VAR_GRAD`, where the group's mean stands for `-log Z`, or `learned_z()`.
    """
    sample = partial(sample_tempered, temperature=temperature, chance=chance, horizon=horizon)
    return Algorithm(
        rollout=with_replay(sample, size=group_size, keep=replay),
        reward=partial(log_reward, beta=beta, final_beta=final_beta, horizon=horizon, floor=floor),
        advantage=raw,
        loss=balance,
    )
