"""REINFORCE++."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.returns import reward_to_go
from jaxrl_llm.advantages.whiten import whiten
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain, optional
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rewards.kl import kl_in_reward
from jaxrl_llm.rollouts.group import sample_group


def reinforce_pp(*, group_size: int = 8, clip: float = 0.2, gamma: float = 1.0, kl: float | None = 0.01) -> Algorithm:
    """PPO without a critic whose advantage is the reward-to-go, normalised over all tokens of the batch.

    Groups play no part: one response a prompt is enough, and easy prompts are not overfitted by their own statistics.

    Source: 2501.03262; the normalisation as in the released code of OpenRLHF and verl (unbiased variance, 1e-8 under
      the root).
    Deviations: none known.
    Limit: with kl=None and gamma=1 the advantage is the whitened outcome, weighted by length.
    Family: policy gradient.

    Args:
      group_size: responses a prompt; 1 in the paper.  # 8: not in the paper, only B * G matters
      clip: both widths.
      gamma: discount a token.
      kl: weight of `log(pi / pi_ref)` in each token's reward; None or 0 drops the reference.
    """
    return Algorithm(
        rollout=partial(sample_group, size=group_size),
        reward=chain(verified, *optional(kl_in_reward, weight=kl)),
        advantage=chain(partial(reward_to_go, gamma=gamma), whiten),
        loss=PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=token_mean),
    )
