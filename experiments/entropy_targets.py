"""AEPO, 2510.08141, and DCPO: entropy held at a target.

Command: python experiments/entropy_targets.py
Time: about 4 minutes of one core.
Claim: the policy's entropy follows any chosen target, where GRPO's falls to nothing.
Reported: entropy tracks every target tried (0.25 to 1.0); GRPO's collapses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from harness import Arm, Comparison, Study, column, main

from jaxrl_llm.algorithms.aepo_arbitrary import aepo_arbitrary
from jaxrl_llm.algorithms.dcpo_distribution import dcpo_distribution
from jaxrl_llm.algorithms.grpo import grpo

TARGETS = (0.1, 0.2, 0.4)
METHODS = {
    "aepo": lambda target: aepo_arbitrary(group_size=8, target=target),
    "dcpo": lambda target: dcpo_distribution(group_size=8, entropy=target, minibatches=1),
}

NAMES = {"aepo": "aepo_arbitrary", "dcpo": "dcpo_distribution"}


def targets_and_reached(axis: Any, found: Any) -> None:
    """A point a target, with the range of the seeds."""
    for method in METHODS:
        y = np.stack([column(found[f"{method} {t}"], "entropy") for t in TARGETS])
        axis.errorbar(
            TARGETS, y.mean(1), [y.mean(1) - y.min(1), y.max(1) - y.mean(1)], marker="o", capsize=3, label=method
        )
    axis.plot(TARGETS, TARGETS, color="#8a8a8a", ls="--", label="target")
    axis.axhline(column(found["grpo"], "entropy").mean(), color="#c0392b", lw=1, label="grpo")
    axis.set(xlabel="target entropy, nats a token", ylabel="entropy at the end")
    axis.legend(fontsize=8, frameon=False)


def miss(arm: str, target: float) -> Any:
    """How far an arm ends from a target, against GRPO."""
    return lambda found: abs(column(found[arm], "entropy") - target) - abs(column(found["grpo"], "entropy") - target)


STUDY = Study(
    methods=("aepo_arbitrary", "dcpo_distribution"),
    rates=(6e-4,),  # grpo's best, for all: entropy falls faster at a higher rate, whatever the method
    arms={
        "grpo": Arm(recipe=grpo(kl=None)),
        **{f"{name} {t}": Arm(recipe=method(t)) for name, method in METHODS.items() for t in TARGETS},
    },
    comparisons=tuple(
        Comparison(
            text=f"{name}: distance to {t}, against grpo's", effect=miss(f"{name} {t}", t), sign=-1, of=NAMES[name]
        )
        for name in METHODS
        for t in TARGETS
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy"),
    draw=targets_and_reached,
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
