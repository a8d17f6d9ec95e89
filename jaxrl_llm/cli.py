"""The command line: `jaxrl-llm train`, `jaxrl-llm quickstart`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import tyro

from jaxrl_llm.job import SHIPPED, TrainConfig, train
from jaxrl_llm.tasks.jsonl import DataError

# The first run of a stranger: the shipped policy knows the form of column addition and mostly forgets the carry.
QUICKSTART = TrainConfig(
    task="arithmetic",
    policy=SHIPPED,
    run=Path("runs/quickstart"),
    overwrite=True,
    algorithm="grpo",
    set={"group_size": "8", "kl": "0"},
    steps=120,
    prompts_per_step=16,
    learning_rate=3e-4,
    eval_every=20,
)


def main() -> None:
    """Entry point; bad input ends in one line on stderr and exit status 2."""
    commands = {
        "train": tyro.conf.OmitArgPrefixes[TrainConfig],
        "quickstart": tyro.conf.OmitArgPrefixes[TrainConfig],
    }
    del commands
    config = tyro.extras.overridable_config_cli(
        {
            "train": ("Train a policy by reinforcement learning on a task.", TrainConfig()),
            "quickstart": ("The shipped policy learns multi-digit addition by GRPO.", QUICKSTART),
        },
        prog="jaxrl-llm",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    assert dataclasses.is_dataclass(config)
    try:
        train(config)
    except (DataError, FileExistsError, FileNotFoundError, ValueError, TypeError) as error:
        print(f"jaxrl-llm: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
