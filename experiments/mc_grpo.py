"""MC-GRPO, 2601.22582: a median as baseline in small groups.

Command: python experiments/mc_grpo.py
Time: about 6 minutes of one core.
Claim: with few rollouts a mean gives advantages of the wrong sign, a median fewer; the gap between groups of 2 and of 8
nearly vanishes.
Reported: the gap of G=2 to G=8 shrinks to less than one point; GRPO degrades strongly at G=2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from harness import Arm, Comparison, Outcome, Study, main

from jaxrl_llm.advantages.group import center_scale
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.algorithms.mc_grpo import center_median_scale, mc_grpo


def sign_flips(name: str, outcome: Outcome) -> dict[str, np.ndarray]:
    """The share of advantages whose sign is not that of reward minus its expectation; normal rewards, a draw a seed."""
    size, seeds = int(name[-1]), len(outcome.values["accuracy"])
    extra = name.startswith("mc")
    reward = jax.random.normal(jax.random.key(0), (seeds, 2000, size + extra))
    credit = center_median_scale if extra else center_scale
    advantage = jax.vmap(jax.vmap(credit))(reward, jnp.ones(reward.shape, bool))
    flipped = (jnp.sign(advantage) != jnp.sign(reward)) & (advantage != 0)
    return {"sign_flips": np.asarray(flipped.sum((1, 2)) / (advantage != 0).sum((1, 2)))}


STUDY = Study(
    methods=("mc_grpo",),
    # 128 rollouts a step for every arm; the median's are one more a group, which only it draws.
    arms={
        "grpo G=2": Arm(recipe=grpo(group_size=2, kl=None), options={"prompts_per_step": 64}),
        "grpo G=8": Arm(recipe=grpo(group_size=8, kl=None)),
        "mc_grpo G=2": Arm(recipe=mc_grpo(group_size=2, kl=None, epochs=1), options={"prompts_per_step": 64}),
        "mc_grpo G=8": Arm(recipe=mc_grpo(group_size=8, kl=None, epochs=1)),
    },
    comparisons=(
        Comparison(
            text="gap of G=8 over G=2: grpo's minus mc_grpo's",
            effect=lambda found: (
                (found["grpo G=8"].values["avg@16"] - found["grpo G=2"].values["avg@16"])
                - (found["mc_grpo G=8"].values["avg@16"] - found["mc_grpo G=2"].values["avg@16"])
            ),
        ),
        Comparison(text="mc_grpo against grpo at G=2", arm="mc_grpo G=2", base="grpo G=2", value="avg@16"),
        Comparison(
            text="wrong signs at G=2", arm="mc_grpo G=2", base="grpo G=2", value="sign_flips", sign=-1, main=False
        ),
    ),
    columns=("accuracy", "avg@16", "pass@8", "sign_flips"),
    extra=sign_flips,
)

if __name__ == "__main__":
    main(__doc__, __file__, STUDY)
