"""DAPO, 2503.14476: its parts one by one.

Command: python experiments/dapo.py
Time: about 8 minutes of one core.
Claim: each part (overlong handling, a higher upper clip, a token mean, dynamic sampling) adds accuracy to GRPO.
Reported: AIME 2024 avg@32 of 30 with GRPO, 36 with overlong filtering, 38 with clip-higher, 41 with soft overlong
punishment, 42 with the token mean, 50 with dynamic sampling.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from harness import Arm, Comparison, Study, main

from jaxrl_llm.algorithm import chain
from jaxrl_llm.algorithms.dapo import dapo
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.filters.basic import not_truncated
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import signed
from jaxrl_llm.rewards.length import overlong
from jaxrl_llm.updates.passes import several_passes

passes = partial(several_passes, minibatches=4)
base = replace(grpo(kl=None), update=passes)
higher = replace(base, loss=replace(base.loss, surrogate=partial(clip_min, low=0.2, high=0.28)))
punished = replace(higher, reward=chain(signed, overlong))
tokens = replace(punished, loss=replace(punished.loss, aggregate=token_mean))

STUDY = Study(
    methods=("dapo",),
    arms={
        "grpo": Arm(recipe=base),
        "overlong filtering": Arm(recipe=replace(base, filter=not_truncated)),
        "+ clip-higher": Arm(recipe=higher),
        "+ overlong punishment": Arm(recipe=punished),
        "+ token mean": Arm(recipe=tokens),
        "+ dynamic sampling (dapo)": Arm(recipe=dapo(minibatches=4)),
    },
    comparisons=(
        Comparison(text="overlong filtering against grpo", arm="overlong filtering", base="grpo"),
        Comparison(text="clip-higher against grpo", arm="+ clip-higher", base="grpo"),
        Comparison(text="overlong punishment added", arm="+ overlong punishment", base="+ clip-higher"),
        Comparison(text="token mean added", arm="+ token mean", base="+ overlong punishment"),
        Comparison(text="dynamic sampling added", arm="+ dynamic sampling (dapo)", base="+ token mean"),
        Comparison(text="all of dapo against grpo", arm="+ dynamic sampling (dapo)", base="grpo"),
    ),
    columns=("accuracy", "avg@16", "pass@8", "entropy", "zero_variance_groups"),
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
