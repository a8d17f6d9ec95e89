"""CAPO, 2510.00819: tokens that would move the policy too much leave the loss.

Command: python experiments/capo.py
Time: about 4 minutes of one core.
Claim: at an aggressive learning rate GRPO collapses and CAPO does not, at the price of a few tokens.
Reported: at 1.5e-5 with small batches GRPO and PPO collapse, CAPO does not; about 8 % of tokens are rejected.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.capo import capo
from jaxrl_llm.algorithms.grpo import grpo

AGGRESSIVE = 1e-2  # where grpo ends below its start


def bounded(bound: float) -> Algorithm:
    """The paper's ratio of the two bounds."""
    return capo(learning_rate=AGGRESSIVE, objective_bound=100 * bound, policy_bound=bound)


STUDY = Study(
    methods=("capo",),
    steps=200,
    arms={
        "grpo, usual rate": Arm(recipe=grpo(kl=None), rates=(1e-3,)),
        "grpo, aggressive": Arm(recipe=grpo(kl=None), rates=(AGGRESSIVE,)),
        # The paper's bound, and those of models this small.
        "capo, aggressive": Arm(
            recipe=bounded(1e-4), others=(bounded(1e-3), bounded(1e-2), bounded(1e-5)), rates=(AGGRESSIVE,)
        ),
    },
    comparisons=(
        Comparison(text="grpo diverges", arm="grpo, aggressive", base="grpo, usual rate", value="avg@16", sign=-1),
        Comparison(text="capo does not", arm="capo, aggressive", base="grpo, aggressive", value="avg@16"),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "tokens/updated"),
    picture="reward/mean",
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
