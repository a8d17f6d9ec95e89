"""DAPO, 2503.14476: its parts one by one.

Command: python experiments/dapo.py
Time: not measured yet.
Claim: each part (overlong handling, a higher upper clip, a token mean, dynamic sampling) adds accuracy to GRPO.
Reported: AIME 2024 avg@32 of 30 with GRPO, 36 with overlong filtering, 38 with clip-higher, 41 with soft overlong
punishment, 42 with the token mean, 50 with dynamic sampling.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.updates.passes import several_passes

passes = partial(several_passes, minibatches=4)
base = replace(grpo(kl=None), update=passes)
higher = replace(base, loss=replace(base.loss, surrogate=partial(clip_min, low=0.2, high=0.28)))
tokens = replace(higher, loss=replace(higher.loss, aggregate=token_mean))

STUDY = Study(
    methods=("dapo",),
    arms={
        "grpo": Arm(recipe=base),
        "+ clip-higher": Arm(recipe=higher),
        "+ token mean": Arm(recipe=tokens),
        "+ dynamic sampling (dapo)": Arm(recipe=dapo(minibatches=4)),
    },
    comparisons=(
        Comparison(text="clip-higher against grpo", arm="+ clip-higher", base="grpo"),
        Comparison(text="token mean added", arm="+ token mean", base="+ clip-higher"),
        Comparison(text="all of dapo against grpo", arm="+ dynamic sampling (dapo)", base="grpo"),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "zero_variance_groups"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
