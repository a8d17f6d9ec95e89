"""DPH-RL, 2509.07430: a divergence that keeps what the policy could do.

Command: python experiments/dph_rl.py
Time: about 5 minutes of one core.
Claim: a forward divergence or Jensen-Shannon on rehearsed answers keeps pass@k, which falls with a reverse one or none.
Reported: reverse KL or none: pass@1 up, pass@k down; forward KL and JS raise both.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.dph_rl import dph_rl, jensen_shannon
from jaxrl_llm.algorithms.grpo import grpo

STUDY = Study(
    methods=("dph_rl",),
    arms={
        "no divergence": Arm(recipe=grpo(kl=None)),
        "reverse kl (grpo)": Arm(recipe=grpo(kl=0.04)),
        "forward kl": Arm(recipe=dph_rl()),
        "jensen-shannon": Arm(recipe=dph_rl(divergence=jensen_shannon, weight=0.2)),
    },
    comparisons=(
        Comparison(text="pass@16, forward kl against none", arm="forward kl", base="no divergence", value="pass@16"),
        Comparison(
            text="pass@16, forward kl against reverse", arm="forward kl", base="reverse kl (grpo)", value="pass@16"
        ),
        Comparison(text="pass@16, js against none", arm="jensen-shannon", base="no divergence", value="pass@16"),
        Comparison(
            text="mean accuracy, forward kl against none, not worse by 0.03",
            arm="forward kl",
            base="no divergence",
            value="avg@16",
            margin=-0.03,
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "pass@16", "entropy"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
