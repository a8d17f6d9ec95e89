"""CHORD, 2508.11408, and HPT, 2509.04419: expert traces within RL, against SFT and then RL.

Command: python experiments/chord.py
Time: about 7 minutes of one core.
Claim: mixing expert traces into the RL objective, by a schedule and a token weight (CHORD) or by a gate (HPT), ends
above SFT followed by RL.
Reported: SFT-then-RL < CHORD-mu < CHORD-phi; HPT above SFT-then-GRPO on six maths sets.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.chord import alike, chord
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.algorithms.hpt import hpt
from jaxrl_llm.algorithms.sft import sft

STUDY = Study(
    methods=("chord", "hpt"),
    warm=200,
    arms={
        "sft": Arm(recipe=sft()),
        "grpo": Arm(recipe=grpo(kl=None)),
        "sft, then rl": Arm(recipe=grpo(kl=None), first=(sft(), 150)),
        "chord-mu": Arm(recipe=chord(peak=0.9, valley=0.05, weighting=alike)),
        "chord-phi": Arm(recipe=chord()),
        "hpt": Arm(recipe=hpt()),
    },
    comparisons=(
        Comparison(text="chord-phi against sft, then rl", arm="chord-phi", base="sft, then rl", of="chord"),
        Comparison(
            text="chord-mu against sft, then rl", arm="chord-mu", base="sft, then rl", value="avg@16", main=False
        ),
        Comparison(text="hpt against sft, then rl", arm="hpt", base="sft, then rl", of="hpt"),
        Comparison(text="chord-phi against rl alone", arm="chord-phi", base="grpo", value="avg@16", main=False),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
