"""DCPO: distribution-centric policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.basic import over_tokens, row_reward
from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import dual_clip
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Memory, Problem, Stage, masked
from jaxrl_llm.updates.passes import several_passes


def tempered_logp(logits: Array, tokens: Array, hidden: Array, *, temperature: float | Array) -> Array:
    """Log-probability of the token at a temperature, `[...]`."""
    z = logits / temperature
    return jnp.take_along_axis(z, tokens[..., None], -1)[..., 0] - jax.nn.logsumexp(z, axis=-1)


def with_tempered(
    memory: Memory, key: Array, batch: Batch, *, entropy: float | Array, most: float | Array, correct: float | Array
) -> tuple[Array, Memory]:
    """`(1 - a) A + a * 1[correct] * rho`, `[B G T]`: group advantages, and REINFORCE under a tempered policy.

    `rho` is the tempered policy's probability of a token to the policy's own, and `a` grows with the distance between
    `entropy` and the one remembered.

    Raises:
      ValueError: the old scores are missing.
    """
    if batch.old is None or batch.old.logp is None or not {"hot", "cold"} <= set(batch.old.extras):
        raise ValueError("with_tempered needs batch.old.logp and the measures 'hot' and 'cold'")
    tempered = jnp.where(memory["entropy"] <= entropy, batch.old.extras["hot"], batch.old.extras["cold"])
    rho = jnp.exp(jnp.clip(masked(batch.mask, tempered - batch.old.logp), -20.0, 20.0))
    rewarded = batch.rows & (row_reward(batch) > correct)
    share = masked_mean(rewarded.astype(jnp.float32), batch.rows)
    gap = jnp.minimum(jnp.abs(entropy - memory["entropy"]), most)
    # gap / share, over 1 + itself; 0 if nothing was rewarded.
    alpha = masked(share > 0, gap / jnp.where(share > 0, share + gap, 1.0))
    extra = jnp.where(over_tokens(batch, rewarded.astype(jnp.float32)) > 0, rho, 0.0)
    return (1 - alpha) * per_group(center_scale, batch) + alpha * extra, memory


def no_entropy(problem: Problem) -> Memory:
    """As in the released code, the first step takes the entropy to be 0."""
    return {"entropy": jnp.zeros(())}


def sampled_entropy(memory: Memory, batch: Batch) -> Memory:
    """The mean of `-l_old` over the step's tokens; the last one if there are none."""
    assert batch.old is not None
    assert batch.old.logp is not None
    now = -masked_mean(masked(batch.mask, batch.old.logp), batch.mask)
    return {"entropy": jnp.where(batch.mask.any(), now, memory["entropy"])}


def dcpo_distribution(
    *,
    group_size: int = 5,
    entropy: float = 0.25,
    hot: float = 1.2,
    cold: float = 0.8,
    most: float = 0.1,
    correct: float = 0.05,
    clip: float = 0.2,
    bound: float = 3.0,
    minibatches: int = 4,
) -> Algorithm:
    """`grpo` that steers its entropy by imitating its right answers as a hotter or colder policy would have drawn them.

    Nothing is sampled at another temperature: importance weights to the tempered distribution stand for it.

    Source: "Distribution-Centric Policy Optimization", 2026, and its released code; numbers of its sampling variant,
      2510.08141.
    Deviations: a token mean, which the released code's trainer defaults to. The temperatures apply to the logits, so
      the run should sample at temperature 1.
    Limit: where the entropy is what it should be it is `grpo` with kl=None, this loss and no tempered part.
    Family: divergence and entropy.

    Args:
      group_size: 5 in the paper.
      entropy: H_0, nats of the sampled tokens.
      hot: temperature while the entropy is at most `entropy`.
      cold: temperature while it is above.
      most: how far from `entropy` still counts.
      correct: rewards above it are.
      clip: both widths.
      bound: of the ratio where the advantage is negative.
      minibatches: optimiser steps a batch.
    """
    steer = partial(with_tempered, entropy=entropy, most=most, correct=correct)
    return replace(
        grpo(group_size=group_size, kl=None),
        measures={"hot": partial(tempered_logp, temperature=hot), "cold": partial(tempered_logp, temperature=cold)},
        advantage=Stage(init=no_entropy, apply=steer, observe=sampled_entropy),
        loss=PolicyLoss(surrogate=partial(dual_clip, low=clip, high=clip, bound=bound), aggregate=token_mean),
        update=partial(several_passes, minibatches=minibatches),
    )
