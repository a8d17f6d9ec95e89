"""SPO, 2509.13232: one rollout a prompt and a tracked baseline.

Command: python experiments/spo_single_stream.py
Time: about 4 minutes of one core.
Claim: without groups there are no degenerate ones; at the same number of rollouts accuracy is higher.
Reported: maj@32 of 63.8 against GRPO's 60.4; late in training more than 80 % of GRPO's rows are in degenerate groups.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.algorithms.spo_single_stream import spo_single_stream

STUDY = Study(
    methods=("spo_single_stream",),
    task=("sorting", {"shortest": 3, "longest": 4, "symbols": "abcd", "rows": 256}),
    # 128 rollouts a step each: 16 groups of 8, or 128 prompts of one.
    arms={
        "grpo": Arm(recipe=grpo(kl=None)),
        "spo": Arm(recipe=spo_single_stream(candidates=1), options={"prompts_per_step": 128}),
    },
    comparisons=(
        Comparison(text="accuracy at the same rollouts", arm="spo", base="grpo", value="avg@16"),
        Comparison(
            text="rows that teach, as mean absolute advantage late",
            arm="spo",
            base="grpo",
            value="advantage/abs",
            main=False,
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "zero_variance_groups", "advantage/abs"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
