"""What the laws must know of a method besides its name."""

from functools import partial

from jaxrl_llm.rollouts.lookahead import stepwise
from jaxrl_llm.updates.momentum import constant


def one_in_eight(world, prompts):
    """Prompts that are rehearsed, where all have a response: these are not learnt."""
    return prompts.index % 8 == 0


# Arguments small enough for the laws' toy task (8 prompts a step, 3 tokens), where the paper's defaults are not.
SMALL: dict[str, dict] = {
    "polychromic": {"size": 4, "members": 2, "epochs": 4},
    # Responses have 3 tokens, and a tree of 2 * 2 leaves is enough.
    "spo_tree": {"branch": (2, 2), "segment": 1, "age": 2},
    # A window of one token has no advantage before the response ends.
    "t_ppo": {"window": 2, "epochs": 8},
    "treepo": {"group_size": 8, "segment": 1, "first": 4},
    # The policy has 60 steps in all, and responses of 3 tokens.
    "vapo": {"pretraining": 1, "floor": 0.95},
    "vc_ppo": {"pretraining": 1},
    # The toy policy starts at random, above the entropy that the paper's filter allows.
    "gtpo": {"limit": 10.0},
    "bupo": {"layer": 0, "steps": 1},  # the model has no more
    "deep_ga": {"population": 32, "sigma": 0.3},  # the paper's is for many more generations
    "harpg": {"gamma": partial(constant, value=0.2)},  # of a length that 60 steps can go far with
    "npg_igt": {"gamma": partial(constant, value=0.2)},
    "pipo": {"start": 2},  # so that the third step looks back
    "d3s": {"steps": 20},
    "spo_single_stream": {"candidates": 1, "minibatches": 2},
    # Minibatches and prompts for a step of 8.
    "clpo": {"length": 2, "minibatches": 2},
    # So few that there is a second update in most steps.
    "spark": {"size": 8},
    "xrpo": {"group_size": 8, "base": 4, "most": 4, "corpus": 16},
    # Responses have 3 tokens, and a policy that knows nothing is unsure among all tokens. Greedy rows alone have no
    # reward at the start.
    "latr": {
        "share": partial(stepwise, at=(0, 20), values=(0.5, 0.25)),
        "absolute": 0.02,
        "relative": 0.3,
        "windows": (1,),
        "force": 2,
    },
    "demo_reg": {"cloning_steps": 2},
    "dph_rl": {"rehearse": one_in_eight},
    "epo_agents": {"turns": 1},
    "ppo_max": {"critic_steps": 1},
    "remix": {"reincarnation": 20},
}

# Methods without a reward to gain: the metric that falls below a bound instead, having started above it.
INSTEAD: dict[str, tuple[str, float]] = {
    # A preference says which of two, not what to say: the loss falls well below log 2, its value without any.
    "dpo": ("loss", 0.3),
    # No reward at all: the divergence from the policy that reads the solution falls to a quarter.
    "opsd": ("loss", 1e-4),
}
