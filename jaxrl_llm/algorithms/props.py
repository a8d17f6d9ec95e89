"""PROPS: proximal robust on-policy sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.behaviour import already_seen
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts.mixed import side_by_side
from jaxrl_llm.stages import through
from jaxrl_llm.types import Batch, Learn, Metrics, PyTree, Rollouts, split
from jaxrl_llm.updates.behaviour import Models, descended
from jaxrl_llm.updates.passes import several_passes


def joined(batch: Batch, new: Rollouts, outcome: Array) -> Rollouts:
    """The rollouts of a batch, then `new` ones of the same prompts; the verifier is not asked again."""
    known = batch.outcome if batch.keep is None else jnp.where(batch.keep, batch.outcome, jnp.nan)
    both = side_by_side(batch.rollouts, new)
    return replace(both, outcome=jnp.concatenate([known, outcome], axis=1))


def sample_what_lacks(
    key: Array,
    models: Models,
    batch: Batch,
    learn: Learn,
    *,
    algorithm: Algorithm,
    behave: Callable[..., tuple[PyTree, Array]],
    size: int,
    rounds: int,
    update: Callable[..., tuple[Models, Metrics]],
) -> tuple[Models, Metrics]:
    """`rounds` times `size` more rows of every prompt, each time by a behaviour policy of its own; then `update`."""
    kl = jnp.zeros(())
    for k in jax.random.split(key, rounds):
        keys = split(k, "behaviour", "rollout", "slots", "update")
        params, kl = behave(keys["behaviour"], models, batch, learn)
        world = learn.world(({**models[0], "policy": params}, models[1]))
        new = world.sample(keys["rollout"], batch.prompts, size)
        batch = through(algorithm, learn.batch(models, joined(batch, new, world.reward(new))), keys["slots"])
    models, metrics = update(keys["update"], models, batch, learn)
    return models, {**metrics, "behaviour_kl": kl}


def props(
    *,
    group_size: int = 8,
    rounds: int = 1,
    clip: float = 0.2,
    behaviour_clip: float = 0.3,
    rate: float = 1e-3,
    norm: float = 0.5,
    target: float = 0.01,
    behaviour_epochs: int = 16,
    behaviour_minibatches: int = 1,
    epochs: int = 1,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` whose later rows are drawn by a behaviour policy that seeks what the earlier ones lack.

    On-policy is a property of the data, not of its sampler: rows drawn by the policy itself have other frequencies than
    its probabilities, until there are many. A copy of the policy is made to unlearn the rows so far, within a clip and
    a bound on the divergence, and draws the next; the policy learns from all as if it had drawn them.

    Source: "On-Policy Policy Gradient Reinforcement Learning Without On-Policy Sampling", 2311.08290, and its code.
    Deviations: control tasks and PPO there, groups of responses and `grpo` here, without its stop at a divergence of
      0.03. Data of earlier steps are forgotten, as by default in the released code.
    Limit: with rate=0 the behaviour policy is the policy: `grpo` with kl=None whose groups are drawn in parts.
    Family: sampling and curricula.

    Args:
      group_size: responses a prompt.  # not in the paper
      rounds: how often the behaviour policy is made; each part of the group is `group_size / (rounds + 1)` rows, the
        first of them the policy's own.  # not in the paper
      clip: both widths of the policy's loss; of the released code.
      behaviour_clip: how much of its probability a token may lose before it has no gradient.
      rate: learning rate of the behaviour policy, by Adam.
      norm: its gradient is clipped to; of the released code.
      target: divergence from the policy at which the behaviour policy stops; 0.01 for discrete actions.
      behaviour_epochs: passes over the rows so far. One pass and one minibatch is ROS, the paper's simpler method.
      behaviour_minibatches: parts of a pass; the released code takes all rows at once.
      epochs: the policy's passes.  # not in the paper
      minibatches: its optimiser steps a pass.  # not in the paper

    Raises:
      ValueError: `rounds` below 1, or a group that does not divide into `rounds + 1` parts.
    """
    if rounds < 1 or group_size < 1 or group_size % (rounds + 1):
        raise ValueError(f"props draws a group in rounds + 1 parts: {group_size=} must divide by {rounds=} + 1")
    size = group_size // (rounds + 1)
    loss = PolicyLoss(
        ratio=partial(token_ratio, old=recomputed),
        surrogate=partial(clip_min, low=clip, high=clip),
        aggregate=sequence_mean_token_mean,
    )
    parent = replace(grpo(group_size=size), loss=loss)
    behave = partial(
        descended,
        loss=partial(already_seen, clip=behaviour_clip),
        rate=rate,
        norm=norm,
        target=target,
        epochs=behaviour_epochs,
        minibatches=behaviour_minibatches,
    )
    update = partial(several_passes, epochs=epochs, minibatches=minibatches)
    more = partial(sample_what_lacks, algorithm=parent, behave=behave, size=size, rounds=rounds, update=update)
    return replace(parent, update=more)
