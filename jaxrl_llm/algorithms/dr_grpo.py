"""Dr. GRPO: GRPO done right."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_sum_over
from jaxrl_llm.losses.surrogates import clip_min


def dr_grpo(*, group_size: int = 8, clip: float = 0.2, max_length: int | None = None) -> Algorithm:
    """`grpo` without its two biases and without divergence.

    No division by the standard deviation, which up-weights very easy and very hard prompts; a constant instead of the
    row's length as denominator, which favours short right and long wrong answers.

    Source: "Understanding R1-Zero-Like Training", 2503.20783, section 3.2.
    Deviations: rows that do not count are not in the denominator.
    Limit: its gradient at the old policy is `(G - 1) / (G * max_length)` times that of `rloo` with kl=None.
    Family: policy gradient.

    Args:
      group_size: 8 in the paper.
      clip: both widths.
      max_length: the constant, in tokens (3000 in the paper); the generation budget if None. The loss falls with it.
    """
    return replace(
        grpo(group_size=group_size, kl=None),
        advantage=partial(per_group, center),
        loss=PolicyLoss(
            surrogate=partial(clip_min, low=clip, high=clip), aggregate=partial(token_sum_over, constant=max_length)
        ),
    )
