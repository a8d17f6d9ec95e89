"""D3S, 2509.22115: fewer rows and tokens in the update.

Command: python experiments/d3s.py
Time: about 3 minutes of one core.
Claim: rows of high variance and tokens of high advantage and entropy give the accuracy of all, from fewer tokens.
Reported: Qwen2.5-Math-7B, pass@1 / pass@8 averages of 29.8 / 53.1 with GRPO; better with under 20 % of the tokens.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.d3s import d3s
from jaxrl_llm.algorithms.grpo import grpo

STUDY = Study(
    methods=("d3s",),
    arms={"grpo": Arm(recipe=grpo(kl=None)), "d3s": Arm(recipe=d3s(kl=None, steps=300))},
    comparisons=(
        Comparison(text="accuracy, not worse by 0.03", arm="d3s", base="grpo", value="avg@16", margin=-0.03),
        Comparison(text="pass@8, not worse by 0.03", arm="d3s", base="grpo", value="pass@8", margin=-0.03),
        Comparison(
            text="tokens updated a step", arm="d3s", base="grpo", value=lambda o: o.mean("tokens/updated"), sign=-1
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "tokens/updated"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
