"""LATR: trees that look ahead."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.rollouts.lookahead import Alike, Share, few_edits, sample_lookahead, stepwise

COUNTDOWN = partial(stepwise, at=(0, 10, 20, 80, 200), values=(1.0, 0.75, 0.5, 0.25, 0.0))
FEW_EDITS = partial(few_edits, below=0.4)


def latr(
    *,
    group_size: int = 8,
    share: Share = COUNTDOWN,
    absolute: float = 0.25,
    relative: float = 0.15,
    alike: Alike = FEW_EDITS,
    windows: tuple[int, ...] = (20, 30, 50),
    force: int = 512,
    full: float = 0.98,
    decay: float = 0.05,
    clip: float = 0.2,
    kl: float | None = 0.01,
) -> Algorithm:
    """`grpo` with more different responses: it forks where two tokens are nearly as probable, and looks where they led.

    Independent samples often say the same in other words. Here rows take their most probable token, and fork at a
    second one nearly as probable; a branch whose next tokens are like those of the row it left is dropped, and makes
    room. Once the group is full the rows are sampled as usual. Later in training fewer rows of a group grow like that.

    Source: "Lookahead Tree-Based Rollouts", 2510.24302, and its released code with the settings for Countdown.
    Deviations: tokens that were taken, not drawn, are trained on as if the policy had drawn them, as in the released
      code, which finds the old log-probs again under the policy: rows are less random than the policy, and no ratio
      corrects it. That code never compares branches that left at a digit or an operator; here all are. It averages the
      loss over tokens, which is `aggregate=token_mean`. Rows that ended with a stop sequence are not compared, like
      those that ended with the end token. Comparisons due at the very end of the budget are not made.
    Limit: a share of 0 is `grpo`; so is force=0.
    Family: sampling and curricula.

    Args:
      group_size: 8 in the paper.
      share: `(step) -> part` of the rows that grow as a tree; for mathematics the paper takes 1, 0.75, 0.5, 0.25 from
        the steps 0, 100, 200, 300.
      absolute: a second token must be more probable than this; 0.15 for mathematics.
      relative: and by less than this less probable than the first; 0.25 for mathematics.
      alike: when a branch is dropped; for mathematics `partial(overlapping, suffix=0.2, rouge=0.5)`.
      windows: the ages, in tokens, at which a branch is compared with the row it left.
      force: tokens after which rows are sampled whether or not the group is full; 1024 for mathematics.
      full: the part of all places that is full enough.
      decay: how much less is, at the end of the budget.
      clip: as in `grpo`.
      kl: as in `grpo`.

    Raises:
      ValueError: no window, or one below 1; `force` below 0.
    """
    if not windows or min(windows) < 1 or force < 0:
        raise ValueError(f"latr: windows must be ages of at least 1, force at least 0; got {windows=}, {force=}")
    sample = partial(sample_lookahead, size=group_size, share=share, force=force, full=full, decay=decay)
    forks = partial(sample, absolute=absolute, relative=relative, windows=windows, alike=alike)
    return replace(grpo(group_size=group_size, clip=clip, kl=kl), rollout=forks)
