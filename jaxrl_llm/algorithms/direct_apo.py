"""Direct advantage-based policy optimisation (DAPO, not ByteDance's)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.losses.regression import RatioRegression
from jaxrl_llm.losses.success_rate import correct, success_rate_loss
from jaxrl_llm.losses.together import Together
from jaxrl_llm.rewards.meaning import same_answer
from jaxrl_llm.rollouts.steps import first_token, next_token, sample_steps
from jaxrl_llm.stats import centered, masked_mean
from jaxrl_llm.tasks.characters import IDS
from jaxrl_llm.types import Batch, masked
from jaxrl_llm.updates.passes import several_passes


def step_advantage(batch: Batch) -> Array:
    """What the critic says after the step, minus its mean over the steps from the same state, `[B G]`.

    Of a step that ends the response the outcome is taken. The critic's value is a logit.

    Raises:
      ValueError: there is no critic.
    """
    if batch.value is None:
        raise ValueError("step_advantage needs batch.value: train with a critic")
    after = next_token(batch.rollouts)
    value = jnp.where(after.any(-1), masked(after, jax.nn.sigmoid(batch.value)).sum(-1), correct(batch))
    return jax.vmap(centered)(value, batch.rows)


def different(batch: Batch) -> Array:
    """`[B G]` bool: the first of the rows that are the same step."""
    tokens, mask = batch.rollouts.tokens, batch.mask
    same = jax.vmap(same_answer)(tokens, mask) & batch.rows[:, None, :]
    return ~jnp.tril(same, k=-1).any(-1)


def undecided(batch: Batch, *, least: float | Array) -> Array:
    """`[B G]` bool: groups whose advantages differ by `least` or more.

    Raises:
      ValueError: no advantage was computed before.
    """
    if batch.advantage is None:
        raise ValueError("undecided needs batch.advantage")
    credit = masked_mean(batch.advantage, batch.mask, axis=-1)
    high = jnp.max(credit, -1, where=batch.rows, initial=-jnp.inf)
    low = jnp.min(credit, -1, where=batch.rows, initial=jnp.inf)
    return jnp.broadcast_to((high - low >= least)[:, None], batch.rows.shape)


def states(batch: Batch) -> Array:
    """`[B G T]` bool: the first token of each row that counts, before which the critic reads the state."""
    return first_token(batch.rollouts) & (True if batch.keep is None else batch.keep[..., None])


def direct_apo(
    *,
    group_size: int = 16,
    beta: float = 0.01,
    least: float = 0.1,
    value_weight: float = 1.0,
    ends: tuple[int, ...] = (IDS["\n"],),
    epochs: int = 1,
    minibatches: int = 4,
) -> Algorithm:
    """Draws the log-ratio of each step to its advantage over the other steps from the same state, which a critic knows.

    No ratio is clipped and no return is waited for: the optimum is `pi_old exp(A / beta)`, whoever drew the steps. The
    critic learns from the same rollouts how often a state is solved.

    Source: "Direct Advantage-Based Policy Optimization" (DAPO, but not ByteDance's), 2412.18279.
    Deviations: offline there, in few iterations with a fixed reference; here each step of the run is an iteration, the
      reference its sampler, and the critic learns along. One state of a prompt a step, not all those of several
      solutions, half of them right; the critic's targets are of the responses the steps are taken from.
    Limit: on-policy, where every response is one step, its gradient is that of REINFORCE with centred rewards over
      `beta`.
    Family: objective and clipping.

    Args:
      group_size: steps from a state, and responses that tell the critic what it is worth; N.
      beta: how much an advantage is worth, in nats: small, as log-probs of a step are sums over its tokens.
      least: states whose advantages differ by less do not count.
      value_weight: of the critic's loss.  # not in the paper
      ends: ids of tokens that end a step; the line break of the procedural tasks' tokenizer if not given.
      epochs: passes over a batch.  # not in the paper
      minibatches: optimiser steps a pass; the regression begins with the second.  # not in the paper
    """
    return Algorithm(
        rollout=partial(sample_steps, size=group_size, ends=ends),
        advantage=step_advantage,
        weight=chain(different, partial(undecided, least=least)),
        loss=Together(
            loss=RatioRegression(beta=beta),
            terms=(partial(success_rate_loss, weight=value_weight),),
            tokens=states,
        ),
        update=partial(several_passes, epochs=epochs, minibatches=minibatches),
    )
