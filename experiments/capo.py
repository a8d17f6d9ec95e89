"""CAPO, 2510.00819: tokens that would move the policy too much leave the loss.

Command: python experiments/capo.py
Time: about 4 minutes on two cores.
Claim: at an aggressive learning rate GRPO collapses and CAPO does not, at the price of a few tokens.
Reported: at 1.5e-5 with small batches GRPO and PPO collapse, CAPO does not; about 8 % of tokens are rejected.
"""

from __future__ import annotations

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.capo import capo
from jaxrl_llm.algorithms.grpo import grpo

AGGRESSIVE = 1e-2  # where grpo ends below its start
BOUNDS = (1e-2, 1e-3, 1e-4)  # of the policy's move; the paper's are for models a hundred thousand times as large

STUDY = Study(
    methods=("capo",),
    steps=200,
    arms={
        "grpo, usual rate": Arm(recipe=grpo(kl=None), rates=(1e-3,)),
        "grpo, aggressive": Arm(recipe=grpo(kl=None), rates=(AGGRESSIVE,)),
        **{
            f"capo {bound:g}": Arm(
                recipe=capo(learning_rate=AGGRESSIVE, objective_bound=100 * bound, policy_bound=bound),
                rates=(AGGRESSIVE,),
            )
            for bound in BOUNDS
        },
    },
    comparisons=(
        Comparison(text="grpo diverges", arm="grpo, aggressive", base="grpo, usual rate", value="avg@16", sign=-1),
        Comparison(
            text="the best capo against grpo, both aggressive",
            effect=lambda found: (
                max((found[f"capo {b:g}"].values["avg@16"] for b in BOUNDS), key=lambda x: x.mean())
                - found["grpo, aggressive"].values["avg@16"]
            ),
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "tokens/updated"),
    picture="reward/mean",
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
