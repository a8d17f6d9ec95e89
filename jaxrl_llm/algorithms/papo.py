"""PAPO: a policy that depends on its evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.kl import k3, kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.prompts.blank import blanked, everywhere
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.types import Batch, Context, Prompts, Rollouts, Scores, World, masked, split


def with_blanks(
    world: World, key: Array, prompts: Prompts, *, rollout: Callable[..., Rollouts], blank: Callable[..., Context]
) -> Rollouts:
    """Rollouts, and in `rollouts.teacher` their contexts after `blank(key, context)`."""
    keys = split(key, "sample", "blank")
    rollouts = rollout(world, keys["sample"], prompts)
    return replace(rollouts, teacher=blank(keys["blank"], rollouts.context))


def blind_logp(logits: Array, tokens: Array, hidden: Array, *, elsewhere: Array) -> Array:
    """A measure: the policy's log-prob of the response after the corrupted prompt, at temperature 1."""
    logp = jax.nn.log_softmax(elsewhere)
    return jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]


def dependence(scores: Scores, batch: Batch, *, weight: float | Array, cap: float | Array, through: bool) -> Array:
    """`-weight * min(k3(l - l_blind), cap)`, `[B G T]`: how far the policy is from itself without the evidence."""
    difference = masked(batch.mask, scores.logp - _blind(scores, through))  # type: ignore[operator]
    return -weight * jnp.minimum(k3(jnp.clip(difference, -20.0, 20.0)), cap)


def double_entropy(scores: Scores, batch: Batch, *, weight: float | Array, through: bool) -> Array:
    """`-weight * (l + l_blind)`, `[B G T]`: the samples' estimate of both entropies, which is to fall."""
    return -weight * masked(batch.mask, scores.logp + _blind(scores, through))  # type: ignore[operator]


def _blind(scores: Scores, through: bool) -> Array:
    logp = scores.extras["blind_logp"]
    return logp if through else jax.lax.stop_gradient(logp)


def papo(
    *,
    group_size: int = 5,
    clip_low: float = 0.2,
    clip_high: float = 0.3,
    kl: float | None = 0.01,
    weight: float | None = 0.02,
    entropy: float | None = 0.03,
    cap: float = 10.0,
    share: float = 0.6,
    blank: int = 0,
    where: Callable[[Context], Array] = everywhere,
    through: bool = False,
) -> Algorithm:
    """`grpo` that is paid for how much its words depend on the prompt: their divergence from those to a corrupted one.

    Unbounded, that reward is hacked; a divergence from the reference and low entropy of both views hold it.

    Source: "Perception-Aware Policy Optimization for Multimodal Reasoning", 2507.06448, PAPO_G.
    Deviations: for text: prompt tokens are blanked, where the paper blackens image patches; one corruption a group. The
      corrupted view is scored with the policy of each optimiser step, there with that at the start of the batch. Not
      here: the smaller weight on incorrect rows, the restriction to some tokens, annealing.
    Limit: with weight=None and entropy=None, and where nothing is blanked with entropy=None, it is `grpo` with these
      widths and `token_mean`.
    Family: divergence and entropy.

    Args:
      group_size: responses a prompt.
      clip_low: lower width.
      clip_high: upper width.
      kl: weight of the divergence from the reference; without it use a weight of 0.01.
      weight: of the divergence that is to grow; larger ones collapse. None or 0 for none.
      entropy: weight of both entropies; 0.05 for 7B models. None or 0 for none.
      cap: of a token's divergence; beyond it there is no gradient.
      share: of the tokens that are blanked.
      blank: the token they become.  # 0: not in the paper
      where: tokens of the prompt that may be blanked, `(Context) -> [... S]` bool.
      through: whether the corrupted view has a gradient; without, its entropy is only a value, as in the released code.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=partial(
            with_blanks,
            rollout=partial(sample_group, size=group_size),
            blank=partial(blanked, share=share, blank=blank, where=where),
        ),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip_low, high=clip_high),
            aggregate=token_mean,
            terms=(
                *optional(kl_to_reference, weight=kl),
                *optional(dependence, weight=weight, cap=cap, through=through),
                *optional(double_entropy, weight=entropy, through=through),
            ),
        ),
        measures={"blind_logp": blind_logp},
    )
