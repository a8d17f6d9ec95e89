"""What the laws must know of a method besides its name."""

# Arguments small enough for the laws' toy task (8 prompts a step, 3 tokens), where the paper's defaults are not.
SMALL: dict[str, dict] = {}

# Methods without a reward to gain: the metric that falls below a bound instead, having started above it.
INSTEAD: dict[str, tuple[str, float]] = {
    # A preference says which of two, not what to say: the loss falls well below log 2, its value without any.
    "dpo": ("loss", 0.3),
}
