"""HPT: hybrid post-training."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.advantages.sources import among_own
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, optional
from jaxrl_llm.algorithms.dr_grpo import dr_grpo
from jaxrl_llm.losses.aggregate import token_sum_over
from jaxrl_llm.losses.entropy import entropy_bonus
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.losses.mixed import MixedLoss, Part, injected, own
from jaxrl_llm.losses.surrogates import unclipped
from jaxrl_llm.rollouts.mixed import with_logged
from jaxrl_llm.weights.gates import own_or_injected


def hpt(
    *,
    group_size: int = 8,
    gate: float = 0.0,
    expert_weight: float = 1.0,
    entropy: float | None = 0.001,
    max_length: int | None = None,
) -> Algorithm:
    """RL on the prompts the policy solves often enough, SFT on a demonstration of the others.

    A prompt with a pass rate above `gate` trains on its own samples by `dr_grpo` without clipping; one at or below it
    loses them and trains on its demonstration. The two losses have denominators of their own.

    Source: "Towards a Unified View of Large Language Model Post-Training", 2509.04419; coefficients as in the released
      code.
    Deviations: the entropy bonus has the denominator of the RL part, and is on its rows only.
    Limit: no prompt at or below the gate (gate below 0): `dr_grpo` without clipping; all of them: `sft`.
    Family: supervised and mixed data.

    Args:
      group_size: own samples a prompt.
      gate: gamma; 0 for Qwen (SFT if no sample is right), 2/8 for Llama.
      expert_weight: of the SFT loss; 0.3 for the 1.5B model.
      entropy: weight of the entropy bonus; None or 0 for none.
      max_length: the RL part's constant, in tokens; the generation budget if None.
    """
    parent = dr_grpo(group_size=group_size, max_length=max_length)
    explore = PolicyLoss(
        surrogate=unclipped,
        aggregate=partial(token_sum_over, constant=max_length),
        terms=optional(entropy_bonus, weight=entropy),
    )
    return replace(
        parent,
        rollout=partial(with_logged, size=group_size),
        advantage=partial(among_own, advantage=partial(per_group, center)),
        weight=partial(own_or_injected, gate=gate),
        loss=MixedLoss(
            parts={
                "own": Part(rows=own, loss=explore),
                "expert": Part(rows=injected, loss=NegativeLogLikelihood(), weight=expert_weight),
            }
        ),
    )
