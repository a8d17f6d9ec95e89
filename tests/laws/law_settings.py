"""What the laws must know of a method besides its name."""

# Arguments small enough for the laws' toy task (8 prompts a step, 3 tokens), where the paper's defaults are not.
SMALL: dict[str, dict] = {
    # A window of one token has no advantage before the response ends.
    "t_ppo": {"window": 2, "epochs": 8},
    # The policy has 60 steps in all, and responses of 3 tokens.
    "vapo": {"pretraining": 1, "floor": 0.95},
    "vc_ppo": {"pretraining": 1},
    # The toy policy starts at random, above the entropy that the paper's filter allows.
    "gtpo": {"limit": 10.0},
    "pipo": {"start": 2},  # so that the third step looks back
    "spo_single_stream": {"candidates": 1, "minibatches": 2},
}

# Methods without a reward to gain: the metric that falls below a bound instead, having started above it.
INSTEAD: dict[str, tuple[str, float]] = {
    # A preference says which of two, not what to say: the loss falls well below log 2, its value without any.
    "dpo": ("loss", 0.3),
    # No reward at all: the divergence from the policy that reads the solution falls to a quarter.
    "opsd": ("loss", 1e-4),
}
