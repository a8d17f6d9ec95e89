"""AEPO: arbitrary entropy policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import recomputed, token_ratio
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.stats import largest, masked_mean
from jaxrl_llm.types import Batch, Memory, Problem, Prompts, Rollouts, Stage, World
from jaxrl_llm.updates.passes import several_passes

Number = float | Array


def no_estimate(problem: Problem) -> Array:
    """An entropy of 0, before there is one."""
    return jnp.zeros(())


def estimated(memory: Memory, batch: Batch) -> Array:
    """The mean of `-l` over the tokens that the policy learns from: what a sampled token tells of the entropy."""
    return jnp.where(batch.rows.any(), -masked_mean(recomputed(batch), batch.mask), memory)


def sample_with_extra(
    entropy: Array, key: Array, world: World, prompts: Prompts, *, size: int, target: Number, hot: Number, cold: Number
) -> tuple[Rollouts, Memory]:
    """Groups, and then those of the first quarter of the prompts once more at another temperature, of `segment` 1."""
    b, quarter = (prompts.index.shape[0] // n for n in (1, 4))
    prompts = jax.tree.map(lambda x: jnp.concatenate([x, x[:quarter]]), replace(prompts, logged=None))
    extra = jnp.broadcast_to((jnp.arange(b + quarter) >= b)[:, None], (b + quarter, size))
    own = jax.tree.map(lambda x: jnp.broadcast_to(x, extra.shape), world.sampling)
    temperature = jnp.where(extra, jnp.where(entropy <= target, hot, cold), own.temperature)
    drawn = world.sample(key, prompts, size, sampling=replace(own, temperature=temperature))
    segment = jnp.broadcast_to(extra[..., None], drawn.tokens.shape).astype(jnp.int32)
    return replace(drawn, sampling=own, segment=segment), entropy  # learnt from under the run's temperature


def is_extra(batch: Batch) -> Array:
    """`[B G]` bool: rows that were sampled at another temperature."""
    ids = batch.rollouts.segment
    return jnp.zeros(batch.rows.shape, bool) if ids is None else ids[..., 0] == 1


def one_for_the_good(batch: Batch, *, threshold: Number) -> Array:
    """`[B G T]`: the group's advantages; of extra rows 1 where they are above `threshold`, else 0."""
    advantage = jax.vmap(center_scale)(row_reward(batch), batch.rows)
    good = (advantage > threshold).astype(advantage.dtype)
    return over_tokens(batch, jnp.where(is_extra(batch), good, advantage))


def in_place(entropy: Array, key: Array, batch: Batch, *, target: Number, most: int) -> tuple[Array, Memory]:
    """`[B G]` bool: `n` of the extra rows with an advantage, and the ordinary rows less `n`, both at random.

    `n` is at most `most`, and half of that if the entropy is above `target`.
    """
    assert batch.advantage is not None  # the slot before
    extra, order = is_extra(batch), jax.random.uniform(key, batch.rows.shape)
    good, ordinary = extra & batch.rows & (batch.advantage > 0).any(-1), batch.rows & ~extra
    n = jnp.minimum(good.sum(), most)
    n = jnp.minimum(jnp.where(entropy > target, n // 2, n), ordinary.sum())
    return jnp.where(extra, largest(order, good, n), ~largest(order, ordinary, n)), entropy


def aepo_arbitrary(
    *,
    group_size: int = 5,
    target: float = 0.75,
    hot: float = 1.2,
    cold: float = 0.8,
    threshold: float = 0.05,
    most: int = 60,
    clip: float = 0.2,
    bound: float = 3.0,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` in which good answers sampled at a higher or lower temperature take the place of some others.

    To become likelier makes what was sampled hot raise the entropy, and what was sampled cold lower it; which of both
    is needed is seen in the last step's log-probs, so the entropy stays near any `target`.

    Source: "Arbitrary Entropy Policy Optimization", 2510.08141, and the released code.
    Deviations: the rows that are replaced are chosen at random, the prompts sampled twice are the first (the released
      code's choice is not known to us). The entropy is that of the rows learnt from, before the update.
    Limit: without extra rows it is `grpo` with kl=None, `token_mean` and `dual_clip`.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.
      target: H_0, nats of a sampled token's `-log p`; 0.25 to 1 in the paper.
      hot: temperature of the extra rows if the entropy is at most the target.
      cold: the same if it is above.
      threshold: group advantage above which an extra row is good.
      most: rows that are replaced; 60 in the paper, of 2560.
      clip: both widths.
      bound: of the ratio where the advantage is negative.
      minibatches: optimiser steps a batch; 4 in the paper. A quarter more than the prompts must divide into them.
    """
    sample = partial(sample_with_extra, size=group_size, target=target, hot=hot, cold=cold)
    clipped = partial(dual_clip, low=clip, high=clip, bound=bound)
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=Stage(init=no_estimate, apply=sample, observe=estimated),
        advantage=partial(one_for_the_good, threshold=threshold),
        weight=Stage(init=no_estimate, apply=partial(in_place, target=target, most=most), observe=estimated),
        loss=PolicyLoss(ratio=partial(token_ratio, old=recomputed), surrogate=clipped, aggregate=token_mean),
        update=partial(several_passes, minibatches=minibatches),
    )
