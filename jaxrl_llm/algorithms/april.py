"""APRIL: active partial rollouts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts.resume import buffer, resume, unfinished, unstarted
from jaxrl_llm.types import Problem, Prompts, Rollouts, Stage, World


def empty_buffer(problem: Problem, *, size: int, oversample: int) -> dict[str, Any]:
    """Room for the groups of a step that are not trained on, oldest first; `held` `[groups]` says which are there."""
    groups = problem.prompts - problem.prompts // oversample
    return {"groups": buffer(problem, groups=groups, size=size), "held": jnp.zeros(groups, bool)}


def first_complete(
    memory: dict[str, Any], key: Array, world: World, prompts: Prompts, *, size: int, oversample: int
) -> tuple[Rollouts, dict[str, Any]]:
    """Samples until `B / oversample` groups are complete; the first of these are the step's, the rest is kept.

    Groups kept from earlier steps go first; new prompts take the places that are left, the other prompts are not
    asked. A group is complete once each of its rows has ended or used its budget.

    Raises:
      ValueError: the prompts do not divide by `oversample`.
    """
    total = prompts.index.shape[0]
    if total % oversample:
        raise ValueError(f"april: {total} prompts a step do not divide by oversample={oversample}")
    new = unstarted(prompts, world.sampling, size=size, length=world.length)
    waiting = jnp.concatenate([memory["held"], jnp.ones(total, bool)])
    places = jnp.argsort(~waiting, stable=True)[:total]
    groups: Rollouts = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[places], memory["groups"], new)
    wanted = total // oversample
    longer = resume(world, key, groups, until=lambda ended: ended.all(-1).sum() >= wanted)

    order = jnp.argsort(unfinished(longer).any(-1), stable=True)
    trained: Rollouts
    trained, kept = (jax.tree.map(lambda x, i=i: x[i], longer) for i in (order[:wanted], jnp.sort(order[wanted:])))
    sampled = (longer.attended & ~groups.attended).sum()
    trained = replace(trained, generated=jnp.full(wanted, sampled / wanted))
    return trained, {"groups": kept, "held": jnp.ones(total - wanted, bool)}


def april(*, group_size: int = 8, oversample: int = 2, clip_low: float = 0.2, clip_high: float = 0.28) -> Algorithm:
    """`grpo` whose steps do not wait for their longest responses: what is unfinished goes on in the next step.

    A step asks for `oversample` times the groups it trains on. A response may hold tokens of several policies; the
    ratio of each token is to the policy that chose it.

    Source: "APRIL: Active Partial Rollouts in Reinforcement Learning to Tame Long-tail Generation", 2509.18521.
    Deviations: groups that complete in the same instant as the last wanted one are kept for the next step; the released
      code drops them. There the log-probs of the old policy may be recomputed; here they are those of the sampler. A
      filter (`filter=informative`) drops groups without waiting for others in their place. No bound on staleness.
      Prompts are drawn for `oversample` times the groups in every step, and those there is no place for are not used.
    Limit: oversample=1 is `grpo` with kl=None and two widths.
    Family: sampling and curricula.

    Args:
      group_size: 8 in the paper.
      oversample: groups started for each one that is trained on; 64 for 32 in the paper.
      clip_low: lower width.
      clip_high: upper width.

    Raises:
      ValueError: `oversample` is below 1.
    """
    if oversample < 1:
        raise ValueError(f"april: oversample must be at least 1, got {oversample}")
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=Stage(
            init=partial(empty_buffer, size=group_size, oversample=oversample),
            apply=partial(first_complete, size=group_size, oversample=oversample),
        ),
        loss=PolicyLoss(surrogate=partial(clip_min, low=clip_low, high=clip_high), aggregate=sequence_mean_token_mean),
    )
