"""MinPRO, GSPO, BAPO and REC where rollouts are 1 to 16 updates old.

Command: python experiments/staleness.py
Time: about 11 minutes of one core.
Claim: GRPO loses accuracy as rollouts grow stale; prefix ratios (2601.22718), sequence ratios (2507.18071), adaptive
bounds (2510.18927) and one-sided clipping without ratios (2509.24203) stay stable.
Reported: with delayed rollouts GRPO and others degrade or collapse, MinPRO stays stable; BAPO keeps entropy; at a
synchronisation interval of 20, REC-OneSide without importance weights does as well as with them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.bapo import bapo
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.algorithms.gspo import gspo
from jaxrl_llm.algorithms.minpro import minpro
from jaxrl_llm.algorithms.rec import rec
from jaxrl_llm.updates.passes import several_passes

UPDATES, PROMPTS = 320, 8  # of every arm: updates, and prompts an update
AGES = (1, 4, 16)
METHODS: dict[str, Algorithm] = {
    "grpo": grpo(kl=None),
    "gspo": gspo(),
    "minpro": minpro(),
    "bapo": bapo(epochs=1),
    "rec": rec(),
}


def arm(recipe: Algorithm, age: int) -> Arm:
    """`age` updates on every batch, the last of them on rollouts `age - 1` updates old."""
    recipe = replace(recipe, update=partial(several_passes, minibatches=age))
    return Arm(recipe=recipe, steps=UPDATES // age, options={"prompts_per_step": PROMPTS * age})


def loss_by_age(name: str) -> Any:
    """How much accuracy is lost between fresh and stale rollouts."""
    return lambda found: found[f"{name} 16"].values["avg@16"] - found[f"{name} 1"].values["avg@16"]


STUDY = Study(
    methods=("minpro", "gspo", "bapo", "rec"),
    arms={f"{name} {age}": arm(recipe, age) for name, recipe in METHODS.items() for age in AGES},
    comparisons=(
        *(
            Comparison(text=f"{name} against grpo, 16 updates old", arm=f"{name} 16", base="grpo 16", of=name)
            for name in METHODS
            if name != "grpo"
        ),
        *(
            Comparison(text=f"{name}: 16 old against fresh", effect=loss_by_age(name), sign=-1, main=False)
            for name in METHODS
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "grad_norm"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
