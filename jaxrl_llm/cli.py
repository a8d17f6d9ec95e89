"""The command line: `jaxrl-llm train`, `quickstart`, `resume`, `runs`, `plan`, `catalogue`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxrl_llm import algorithms, catalogue, runs, tasks
from jaxrl_llm.checkpoint import CheckpointError
from jaxrl_llm.execute import execute
from jaxrl_llm.folder import FolderError
from jaxrl_llm.job import SHIPPED, Job, TrainConfig, prepare, resumable
from jaxrl_llm.plan import PlanConfig
from jaxrl_llm.watch import BadUpdate, Preempted

# The first run of a stranger: the shipped policy knows the form of column addition and mostly forgets the carry.
QUICKSTART = TrainConfig(
    task="arithmetic",
    task_options={"digits": 4},
    policy=SHIPPED,
    run=Path("runs/quickstart"),
    overwrite=True,
    algorithm="grpo",
    set={"group_size": 8, "kl": None},
    steps=100,
    prompts_per_step=16,
    learning_rate=1e-4,
    eval_every=10,
)

DESCRIPTION = """Reinforcement learning on language models.

    jaxrl-llm quickstart
    jaxrl-llm quickstart --seed 1 --algorithm rloo --run runs/rloo
    jaxrl-llm train --task countdown --steps 500 --learning-rate 1e-4
    jaxrl-llm train --task gsm8k --data FOLDER --policy FOLDER --set group_size=16 clip=0.2 kl=none
    jaxrl-llm train --policy FOLDER --lora-rank 16 --quantize nf4 --learning-rate 1e-4
    jaxrl-llm runs
    jaxrl-llm resume runs/train --steps 1000
    jaxrl-llm plan --model qwen2.5-7b --topology v5e:8x8 --mesh fsdp=16,tensor=4 --accumulate 4
    jaxrl-llm catalogue --family credit
    jaxrl-llm catalogue show dapo

A run leaves a folder: config.json, metrics.jsonl, events.jsonl, checkpoints/, summary.json, transcripts.json, policy/,
curve.png. Told to end (SIGTERM) it saves a checkpoint and exits with status 0; whatever ended it, resume goes on.
"""


@dataclasses.dataclass(frozen=True)
class Show:
    """One method: docstring, arguments, expression, what differs from its parent, verdict."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """The method."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """All that is known of it, as JSON."""


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """The methods there are."""

    method: (
        Annotated[None, tyro.conf.subcommand("list", prefix_name=False, description="The table.")]
        | Annotated[Show, tyro.conf.subcommand("show", prefix_name=False)]
    ) = None
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """All that is known of them, as JSON."""
    family: str | None = None
    """One family only; a part of its name is enough."""


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest undamaged checkpoint: the same steps, to the last bit."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Its folder."""
    steps: int | None = None
    """Steps of the whole run; none: as many as it was started with."""


@dataclasses.dataclass(frozen=True)
class Runs:
    """The runs in a folder: how far they are, and whether they run, have finished, or were interrupted."""

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Where to look."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """All that is known of them, as JSON."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit status 2, and one line on stderr, where the input cannot be used."""
    # transformers is here for its tokenizers; that there is no PyTorch is as it should be.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = parse(arguments)
    try:
        if isinstance(config, Catalogue):
            return _print(answer(config))
        if isinstance(config, Runs):
            return _print(_standings(config))
        if isinstance(config, PlanConfig):
            return _planned(config)
        with _quiet("jaxrl_llm.tasks"):  # the run shows the task's report itself
            job = _job(config)
    except (ValueError, OSError, ImportError) as error:
        if isinstance(error, ModuleNotFoundError):  # not the user's; a missing extra is an ImportError in words
            raise
        _complain(error)
        sys.exit(2)
    attempt(job)


def attempt(job: Job) -> None:
    """Executes a job and says how it ended where that is not the end of it: exit status 1, or 130 for Ctrl-C."""
    again = f"jaxrl-llm resume {shlex.quote(str(job.config.run))}"
    try:
        execute(job)
    except KeyboardInterrupt:
        _complain(f"interrupted; {job.config.run}/metrics.jsonl holds the steps so far, and {again} goes on")
        sys.exit(130)
    except Preempted as ended:
        _complain(f"{ended}; {again} goes on")
    except (BadUpdate, CheckpointError, FolderError, OSError) as error:
        _complain(f"{error} ({again} goes on from the last checkpoint that can be used)")
        sys.exit(1)


def _job(config: TrainConfig | Resume) -> Job:
    if isinstance(config, Resume):
        return prepare(resumable(config.run, config.steps), resumed=True)
    return prepare(config)


def _complain(what: Any) -> None:
    print(f"jaxrl-llm: {' '.join(str(what).split())}", file=sys.stderr)


def parse(arguments: Sequence[str] | None = None) -> TrainConfig | Catalogue | Resume | Runs | PlanConfig:
    """What a command line (`sys.argv` if None) asks for. Exits with status 2 where it is nothing."""
    named = f"Algorithms: {', '.join(algorithms.names())}.\nTasks: {', '.join(tasks.names())}."
    config: TrainConfig | Catalogue | Resume | Runs | PlanConfig = tyro.extras.subcommand_cli_from_dict(
        {
            **{"train": _train, "quickstart": _quickstart, "resume": _resume, "runs": _runs},
            **{"plan": _plan, "catalogue": _catalogue},
        },
        prog="jaxrl-llm",
        description=f"{DESCRIPTION}\n{named}",
        args=arguments,
        registry=_pairs(),
    )
    return config


def answer(question: Catalogue) -> str:
    """A table, a page, or JSON.

    Raises:
      ValueError: there is no such method or family, or a family is asked for one method.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if question.method is None:
        found = catalogue.entries(question.family)
        return _json([dataclasses.asdict(e) for e in found]) if question.json else catalogue.table(found, width)
    if question.family is not None:
        raise ValueError("--family chooses methods for the table: show has one already")
    entry = catalogue.entry(question.method.name)
    if question.json or question.method.json:
        return _json(dataclasses.asdict(entry))
    return catalogue.plain_text(entry, min(width or 100, 100))


def _planned(config: PlanConfig) -> None:
    """Prints the plan; exit status 1 if the step does not fit."""
    import jax

    from jaxrl_llm import plan, plan_text

    kind, _, devices = config.topology.partition(":")
    with contextlib.suppress(RuntimeError):  # JAX runs already: `plan` says so if it has too few devices
        jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and must not wait for one
        if kind == "cpu" and devices.isdigit():
            jax.config.update("jax_num_cpu_devices", int(devices))
    found = plan.plan(config)
    _print(plan_text.as_json(found) if config.json else plan_text.text(found))
    if not found.memory.fits:
        sys.exit(1)


def _standings(question: Runs) -> str:
    found = runs.standings(question.folder)
    if question.json:
        return _json([dataclasses.asdict(run) for run in found])
    return runs.table(found) if found else f"no runs in {question.folder}"


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, allow_nan=False)


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _train(config: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()) -> TrainConfig:  # noqa: B008, frozen
    """Train a policy on a task by reinforcement learning."""
    return config


def _plan(config: tyro.conf.OmitArgPrefixes[PlanConfig]) -> PlanConfig:
    """Compile a training step for a TPU slice, without one: memory, time and traffic of a chip."""
    return config


def _resume(run: tyro.conf.OmitArgPrefixes[Resume]) -> Resume:
    """Go on with a run from its newest undamaged checkpoint: the same steps, to the last bit."""
    return run


def _runs(question: tyro.conf.OmitArgPrefixes[Runs] = Runs()) -> Runs:
    """The runs in a folder: how far they are, and whether they run, have finished, or were interrupted."""
    return question


def _catalogue(methods: tyro.conf.OmitArgPrefixes[Catalogue] = Catalogue()) -> Catalogue:
    """The methods there are, and what each of them is."""
    return methods


def _quickstart(config: tyro.conf.OmitArgPrefixes[TrainConfig] = QUICKSTART) -> TrainConfig:
    """The shipped policy learns addition by GRPO: the same job as `train` with other defaults."""

    def merged(field: str, of: str) -> dict[str, Any]:
        default: dict[str, Any] = getattr(QUICKSTART, field)
        given: dict[str, Any] = getattr(config, field)
        if getattr(config, of) == getattr(QUICKSTART, of):
            return default | given  # naming one argument leaves the others as they are
        return {} if given is default else given  # another recipe or task has other arguments

    return dataclasses.replace(config, set=merged("set", "algorithm"), task_options=merged("task_options", "task"))


def _pairs() -> tyro.constructors.ConstructorRegistry:
    """Reads `dict[str, Any]` as `name=value name=value`."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        if info.type is not dict and info.type != dict[str, Any]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[NAME=VALUE ...]",
            instance_from_str=_parsed,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda pairs: [f"{name}={_shown(value)}" for name, value in pairs.items()],
        )

    return registry


def _parsed(pairs: list[str]) -> dict[str, Any]:
    """Numbers, true, false and none are what they look like, everything else is text."""
    result = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name:
            raise ValueError(f"expected NAME=VALUE, got {pair!r}")
        result[name.strip().replace("-", "_")] = _value(value.strip())
    return result


def _value(text: str) -> Any:
    if text.lower() in ("none", "null"):
        return None
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _shown(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
