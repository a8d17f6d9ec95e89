"""AHPO: adaptive hybrid policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.advantages.sources import among_own
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import sequence_mean_token_mean, token_mean
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rollouts.mixed import with_logged
from jaxrl_llm.weights.gates import injected_if_rare


def ahpo(*, group_size: int = 8, clip: float = 0.2, fewer_than: float = 1.0) -> Algorithm:
    """`grpo`, and the likelihood of an expert's response to prompts that the policy rarely solves.

    `L_on + xi * L_off`, `xi = 1` for a prompt with fewer than `fewer_than` right samples; its own samples stay. Both
    are means over all prompts, so that the expert's part falls as the policy learns.

    Source: "MM-HELIX", 2510.08540; the objective, with `L_off` a mean over the expert's tokens.
    Deviations: described only in part: the equation is known, not the threshold, nor whether there is a divergence;
      here there is none. No training code was released.
    Limit: fewer_than=0 is `grpo` with kl=None and `token_mean`; above the group size the expert's part is always on.
    Family: supervised and mixed data.

    Args:
      group_size: own samples a prompt.  # not in the paper
      clip: both widths.  # not in the paper
      fewer_than: right samples from which the expert is not asked.  # 1, only all-wrong groups: not in the paper
    """
    explore = PolicyLoss(surrogate=partial(clip_min, low=clip, high=clip), aggregate=token_mean)
    expert = NegativeLogLikelihood(aggregate=sequence_mean_token_mean)
    return replace(
        grpo(group_size=group_size, kl=None),
        rollout=partial(with_logged, size=group_size),
        advantage=partial(among_own, advantage=partial(per_group, center_scale)),
        weight=partial(injected_if_rare, fewer_than=fewer_than),
        loss=MixedLoss(
            parts={
                "own": Part(rows=own, loss=explore),
                "expert": Part(rows=injected, loss=expert),
            }
        ),
    )
