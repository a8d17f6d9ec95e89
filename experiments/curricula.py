"""VADE, 2511.18902, PCL, 2510.01135, and Prompt-GDRO, 2601.19280: which prompts to learn from.

Command: python experiments/curricula.py
Time: about 7 minutes of one core.
Claim: choosing prompts by a posterior of success, or by a value model, or weighting them against the learner, makes
more groups informative than uniform sampling does, and ends higher at the same rollouts.
Reported: PCL 83.4 in 14.0 h, GRPO 83.0 in 29.2 h; Prompt-GDRO +9.7 to +13.1 % pass@8; for VADE no number is known.
"""

from __future__ import annotations

import numpy as np
from harness import Arm, Comparison, Outcome, Study, main

from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.algorithms.pcl import pcl
from jaxrl_llm.algorithms.prompt_gdro import prompt_gdro
from jaxrl_llm.algorithms.vade import vade


def informative(outcome: Outcome) -> np.ndarray:
    """The share of groups that taught something, over all of training."""
    return 1 - outcome.mean("zero_variance_groups")


def steps(outcome: Outcome) -> np.ndarray:
    """Until half of the sampled answers to held-out problems were right."""
    return outcome.steps_to(0.5)


STUDY = Study(
    methods=("vade", "pcl", "prompt_gdro"),
    # Few enough prompts to meet each of them often; 16 groups of 8 a step for every arm.
    task=("sorting", {"shortest": 2, "longest": 5, "symbols": "abcd", "rows": 512}),
    arms={
        "uniform": Arm(recipe=grpo(kl=None)),
        "vade": Arm(recipe=vade(candidates=4), options={"prompts_per_step": 64}),
        "pcl": Arm(recipe=pcl(group_size=8, candidates=4), options={"prompts_per_step": 64}),
        "prompt_gdro": Arm(recipe=prompt_gdro(group_size=8, kl=None, minibatches=1)),
    },
    comparisons=(
        Comparison(text="vade: share of informative groups", arm="vade", base="uniform", value=informative, of="vade"),
        Comparison(text="pcl: share of informative groups", arm="pcl", base="uniform", value=informative, of="pcl"),
        Comparison(text="vade: steps to 0.5 held out", arm="vade", base="uniform", value=steps, sign=-1, of="vade"),
        Comparison(text="pcl: steps to 0.5 held out", arm="pcl", base="uniform", value=steps, sign=-1, of="pcl"),
        Comparison(
            text="prompt_gdro: steps to 0.5 held out",
            arm="prompt_gdro",
            base="uniform",
            value=steps,
            sign=-1,
            of="prompt_gdro",
        ),
        Comparison(text="vade: held-out accuracy", arm="vade", base="uniform", value="avg@16", of="vade"),
        Comparison(text="pcl: held-out accuracy", arm="pcl", base="uniform", value="avg@16", of="pcl"),
        Comparison(text="prompt_gdro: pass@8", arm="prompt_gdro", base="uniform", value="pass@8", of="prompt_gdro"),
    ),
    columns=("accuracy", "avg@16", "pass@8", "zero_variance_groups"),
    watch=20,
    picture="zero_variance_groups",
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
