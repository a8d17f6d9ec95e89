"""GBPO, 2604.18578: the ratio is regressed on that of the best bounded policy.

Command: python experiments/bpo_gbpo.py
Time: about 4 minutes of one core.
Claim: with many epochs a batch, GBPO matches or beats GRPO and is more stable.
Reported: matches or beats GRPO on MATH and AIME with 5 to 10 epochs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.bpo_gbpo import bpo_gbpo
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.updates.passes import several_passes

EPOCHS = 5

STUDY = Study(
    methods=("bpo_gbpo",),
    steps=120,
    arms={
        "grpo, 5 epochs": Arm(recipe=replace(grpo(kl=None), update=partial(several_passes, epochs=EPOCHS))),
        "gbpo, 5 epochs": Arm(recipe=bpo_gbpo(kl=None, epochs=EPOCHS)),
    },
    comparisons=(
        Comparison(text="accuracy", arm="gbpo, 5 epochs", base="grpo, 5 epochs", value="avg@16"),
        Comparison(
            text="largest ratio, late",
            arm="gbpo, 5 epochs",
            base="grpo, 5 epochs",
            value="ratio/max",
            sign=-1,
            main=False,
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "ratio/max", "grad_norm"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
