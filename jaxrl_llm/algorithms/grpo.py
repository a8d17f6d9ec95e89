"""Group relative policy optimisation."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean
from jaxrl_llm.losses.kl import Estimator, as_loss, k3, kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts.group import sample_group


def grpo(*, group_size: int = 8, clip: float = 0.2, kl: float | None = 0.04, kl_estimator: Estimator = k3) -> Algorithm:
    """PPO without a critic: the group's mean and standard deviation take the place of the value function.

    Source: DeepSeekMath, 2402.03300, eq. 3 and 4, section 4.1.2 (outcome supervision).
    Deviations: the reference is not renewed between outer iterations. The standard deviation is the unbiased one with
      1e-6 added (the paper does not say); groups of one have advantage 0.
    Limit: with kl=None, one update a batch and `per_group(center)`, its gradient is that of REINFORCE.
    Family: policy gradient.

    Args:
      group_size: 64 in the paper; 8 is usual.  # not in the paper
      clip: both widths. One update a batch, the paper's setting, never reaches them.
      kl: weight of the divergence in the loss; None or 0 drops the reference.
      kl_estimator: of a token's divergence; k1 is refused, as it would do nothing.
    """
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        advantage=partial(per_group, center_scale),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip),
            aggregate=sequence_mean_token_mean,
            terms=optional(kl_to_reference, weight=kl, estimator=as_loss(kl_estimator)),
        ),
    )
