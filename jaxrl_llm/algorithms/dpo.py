"""Direct preference optimisation."""

from __future__ import annotations

from functools import partial

from jaxrl_llm.advantages.basic import raw
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.filters.pairs import best_and_worst
from jaxrl_llm.losses.preference import PreferenceLoss, logistic
from jaxrl_llm.rollouts.logged import logged


def dpo(*, beta: float = 0.1, smoothing: float = 0.0) -> Algorithm:
    """Logged pairs and a logistic loss on the difference of their log-ratios: no samples, no reward model.

    The chosen and the rejected response are those with the highest and the lowest logged reward; prompts where all are
    equal are left out. With `rollout=partial(sample_group, size=8)` it learns from its own samples instead.

    Source: 2305.18290, eq. 7; log-probs are summed over the response, EOS included.
    Deviations: the advantage slot is not read by the loss.
    Limit: at the reference the loss is log 2 and its gradient is `beta / 2` times that of REINFORCE with `A` of +1 and
      -1.
    Family: preference.

    Args:
      beta: strength of the implicit divergence; 0.1 in the paper (0.5 on TL;DR).
      smoothing: probability that a label is flipped.  # conservative DPO; 0 in the paper
    """
    return Algorithm(
        rollout=logged,
        filter=best_and_worst,
        advantage=raw,
        loss=PreferenceLoss(objective=partial(logistic, beta=beta, smoothing=smoothing)),
    )
