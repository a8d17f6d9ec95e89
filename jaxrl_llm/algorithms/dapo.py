"""DAPO: decoupled clip and dynamic sampling."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.filters.basic import informative
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import signed
from jaxrl_llm.rewards.length import overlong
from jaxrl_llm.rollouts.dynamic import sample_until_informative
from jaxrl_llm.updates.passes import several_passes


def dapo(
    *,
    group_size: int = 8,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    rounds: int = 2,
    limit: int | None = None,
    cache: int | None = None,
    minibatches: int = 1,
) -> Algorithm:
    """`grpo` with four changes, and no divergence.

    A wider upper clip lets unlikely tokens grow; groups that are all right or all wrong are replaced; every token
    counts the same; answers that come near the length limit lose up to 1.

    Source: 2503.14476, eq. 8 (objective), 11 (dynamic sampling), 13 (overlong punishment).
    Deviations: sampling stops after `rounds` chunks, so a step trains on `B / rounds` groups or fewer; the token mean
      is over the batch, as in the released code. That code also clips at ratio 10 where the advantage is negative
      (`dual_clip` does). Overlong *filtering*, the alternative, is `chain(informative, not_truncated)`.
    Limit: with equal widths, the `everything` filter and `verified` rewards it is `grpo` with kl=None and `token_mean`.
    Family: policy gradient.

    Args:
      group_size: 16 in the paper.  # 8: not in the paper
      clip_low: lower width.
      clip_high: upper width.
      rounds: chunks the prompts of a step are cut into.  # not in the paper: it samples until full
      limit: tokens; 20480 in the paper; the generation budget if None.
      cache: tokens below the limit where the punishment starts; 4096 in the paper, a fifth of the limit if None.
      minibatches: optimiser steps a batch; 16 in the paper.  # 1: the clip acts from the second on
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=partial(sample_until_informative, size=group_size, rounds=rounds),
        reward=chain(signed, partial(overlong, limit=limit, cache=cache)),
        filter=informative,
        loss=PolicyLoss(surrogate=partial(clip_min, low=clip_low, high=clip_high), aggregate=token_mean),
        update=partial(several_passes, minibatches=minibatches),
    )
