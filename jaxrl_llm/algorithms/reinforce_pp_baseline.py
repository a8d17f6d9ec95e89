"""REINFORCE++ with the group's mean as baseline."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain, optional
from jaxrl_llm.algorithms.reinforce_pp import reinforce_pp
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.kl import k2, kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min


def reinforce_pp_baseline(*, group_size: int = 8, clip: float = 0.2, kl: float | None = 0.01) -> Algorithm:
    """`reinforce_pp` that subtracts the group's mean before it normalises; the divergence is a loss term.

    The batch's spread is steadier than a small group's. Long rows count more in it, so groups no longer sum to 0.

    Source: 2501.03262 (REINFORCE++-baseline).
    Deviations: none known.
    Limit: with kl=None, and whitening left out, its gradient at the old policy is that of centred REINFORCE.
    Family: policy gradient.

    Args:
      group_size: responses a prompt, 4 to 16.
      clip: both widths.
      kl: weight of k2 in the loss; None or 0 drops the reference.
    """
    return replace(
        reinforce_pp(group_size=group_size, kl=None),
        advantage=chain(partial(per_group, center), whiten),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            aggregate=token_mean,
            terms=optional(kl_to_reference, weight=kl, estimator=k2),
        ),
    )
