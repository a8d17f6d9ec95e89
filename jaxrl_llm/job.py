"""The main job: load a policy, train it on a task, evaluate it, and leave a folder that tells all."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import IO, Any, Literal

import jax
import numpy as np

from jaxrl_llm import algorithms, checkpoint, report, tasks
from jaxrl_llm.algorithm import Algorithm, describe
from jaxrl_llm.arguments import arguments
from jaxrl_llm.engine import learner
from jaxrl_llm.evaluate import Evaluation, evaluator
from jaxrl_llm.models import hf
from jaxrl_llm.models.heads import critic as critic_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.progress import Display
from jaxrl_llm.run import run
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Learner, Metrics, PyTree, Sampling, TrainState
from jaxrl_llm.updates.optimizer import adamw

SHIPPED = Path(__file__).parent / "data" / "quickstart"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run."""

    task: str = "arithmetic"
    """Name of a task in jaxrl_llm/tasks."""
    data: Path | None = None
    """Folder or file the task reads, if it reads any (gsm8k: a folder with train.jsonl and test.jsonl)."""
    task_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of the task's function, as --task-options digits=4 operands=2."""
    skip_bad_rows: bool = False
    """Leave out malformed rows of the data and say how many, instead of stopping."""
    algorithm: str = "grpo"
    """Name of a recipe in jaxrl_llm/algorithms."""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the recipe, as --set group_size=8 clip=0.2 kl=none; functions by name: kl_estimator=k2."""
    policy: Path | None = None
    """Hugging Face folder of the policy (config.json, model.safetensors, tokenizer.json); none: a small random one."""
    run: Path = Path("runs/train")
    """Folder the run leaves behind."""
    overwrite: bool = False
    """Replace what an earlier run left in the folder."""
    steps: int = 200
    """Training steps: each samples, verifies and learns once."""
    prompts_per_step: int = 8
    """Prompts per step; each gets a group of rollouts."""
    response_length: int | None = None
    """Tokens a response may have; none: what the task says."""
    learning_rate: float = 1e-6
    """AdamW's learning rate for the policy. 1e-6 suits large models; small ones want 1e-4 and more."""
    critic_learning_rate: float = 1e-5
    """AdamW's learning rate for the critic, if the recipe has one."""
    temperature: float = 1.0
    """Of sampling in training; accuracy is that of greedy answers."""
    top_k: int | None = None
    """Sample from the k most probable tokens only."""
    top_p: float | None = None
    """Sample from the most probable tokens that hold this much probability only."""
    min_p: float | None = None
    """Sample only tokens at least this probable, relative to the most probable one."""
    accumulate: int = 1
    """Micro-batches per optimiser step: less memory, same result."""
    scan: int = 1
    """Steps per compiled program: faster where a step is short."""
    verify: Literal["inside", "between"] = "inside"
    """Where a verifier that runs on the host is asked: inside the one program, or between two."""
    eval_problems: int = 512
    """Held-out problems, answered greedily before and after (at most as many as there are)."""
    eval_every: int = 0
    """Also evaluate every so many steps; 0: only before and after."""
    seed: int = 0
    """Decides everything random."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration with everything it names, found, read and checked. Made by `prepare`."""

    config: TrainConfig
    algorithm: Algorithm
    task: Task
    model: TransformerConfig
    params: PyTree | None
    tokenizer: Any


def train(config: TrainConfig) -> dict[str, Any]:
    """`execute(prepare(config))`."""
    return execute(prepare(config))


def prepare(config: TrainConfig) -> Job:
    """Reads and checks all that a user can get wrong; trains nothing and writes nothing.

    Raises:
      ValueError: a name, number or argument in the configuration, a malformed row of the data (`DataError`),
        or a policy that does not fit the task.
      OSError: a file that is missing, or a run in the folder although `overwrite` is off (`FileExistsError`).
    """
    _check(config)
    algorithm = algorithms.load(config.algorithm, **arguments(algorithms.recipe(config.algorithm), config.set, "--set"))
    if config.policy is None:
        task = _task(config, None)
        return Job(
            config=config,
            algorithm=algorithm,
            task=task,
            model=_small(len(task.tokenizer)),
            params=None,
            tokenizer=task.tokenizer,
        )
    model, params = hf.load(config.policy)
    tokenizer = _tokenizer(config.policy)
    task = _task(config, tokenizer)
    if model.vocab_size < len(tokenizer):
        raise ValueError(f"{config.policy}: the model knows {model.vocab_size} tokens, its tokenizer {len(tokenizer)}")
    return Job(config=config, algorithm=algorithm, task=task, model=model, params=params, tokenizer=tokenizer)


def execute(job: Job) -> dict[str, Any]:
    """Trains; everything there is to know is in the folder `config.run` afterwards.

    Writes `config.json` (the exact configuration, the recipe as an expression, versions), `metrics.jsonl` (a line a
    step; `seconds` is training time so far, compilation included, evaluation not), `summary.json`, `transcripts.json`,
    `checkpoint/` (the whole training state), `policy/` (the trained policy as a Hugging Face folder), and `curve.png`
    where matplotlib is installed.

    Returns:
      what `summary.json` holds: `before` and `after` with `accuracy` (greedy) and `reward` (mean, sampled as in
      training), `train_seconds`, `seed` and more.
    """
    config, task = job.config, job.task
    folder = _folder(job)
    parts = learner_of(job)
    policy = language_model(transformer(job.model))
    evaluate = evaluator(
        policy,
        task,
        problems=config.eval_problems,
        response_length=config.response_length,
        sampling=_sampling(config),
    )
    evaluations: dict[int, Evaluation] = {}

    with Display(config.steps, title=f"{config.algorithm} on {task.name}") as display, _lines(folder) as log:
        display.say(_headline(job))
        state = jax.jit(parts.init)(jax.random.key(config.seed))
        evaluations[0] = evaluate(state.params["policy"])
        display.evaluated(0, evaluations[0])
        watch = _Watch(config, log, display, evaluate, evaluations)
        prompts = None if task.batches is None else task.batches(config.seed, config.prompts_per_step)
        state, _ = run(parts, None, config.steps, state=state, prompts=prompts, scan=config.scan, each=watch)
        evaluations[config.steps] = evaluate(state.params["policy"])
        display.evaluated(config.steps, evaluations[config.steps])

    before, after = evaluations[0], evaluations[config.steps]
    checkpoint.save(folder / "checkpoint", state)
    hf.save(folder / "policy", job.model, jax.device_get(state.params["policy"]), tokenizer=job.tokenizer)
    summary = {
        "before": _short(before),
        "after": _short(after),
        "train_seconds": round(watch.seconds, 2),
        "seed": config.seed,
        "steps": config.steps,
        "problems": before.problems,
        "evaluations": {str(step): _short(e) for step, e in evaluations.items()},
    }
    _write(folder / "transcripts.json", {"before": before.transcripts, "after": after.transcripts})
    _write(folder / "summary.json", summary)
    report.curve(folder)
    display.transcripts(before, after)
    display.outcome(before, after, watch.seconds, folder)
    return summary


def learner_of(job: Job) -> Learner:
    """The job's training step; with it, its checkpoint can be read."""
    config, model = job.config, transformer(job.model)
    return learner(
        job.algorithm,
        policy=language_model(model),
        task=job.task,
        params=job.params,
        critic=critic_of(model),
        optimizer=adamw(config.learning_rate),
        critic_optimizer=adamw(config.critic_learning_rate),
        prompts_per_step=config.prompts_per_step,
        response_length=config.response_length,
        sampling=_sampling(config),
        accumulate=config.accumulate,
        verify=config.verify,
    )


def _sampling(config: TrainConfig) -> Sampling:
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)


class _Watch:
    """What happens on the host after every program: a line of metrics, the display, now and then an evaluation."""

    def __init__(
        self,
        config: TrainConfig,
        log: IO[str],
        display: Display,
        evaluate: Callable[[PyTree], Evaluation],
        evaluations: dict[int, Evaluation],
    ) -> None:
        self.seconds = 0.0
        self._config, self._log, self._display = config, log, display
        self._evaluate, self._evaluations = evaluate, evaluations
        self._clock = time.perf_counter()

    def __call__(self, done: int, state: TrainState, metrics: Metrics) -> None:
        values = {name: np.asarray(x) for name, x in metrics.items()}  # waits for the step
        spent = time.perf_counter() - self._clock
        steps = len(values["loss"])
        for i in range(steps):
            self.seconds += spent / steps
            line: dict[str, Any] = {"step": done - steps + i + 1, "seconds": round(self.seconds, 4)}
            line |= {name: _finite(x[i]) for name, x in values.items()}
            self._log.write(json.dumps(line, allow_nan=False) + "\n")
        self._log.flush()
        self._display.stepped(done, {name: float(x[-1]) for name, x in values.items()}, spent / steps)
        every = self._config.eval_every
        if every and done % every == 0 and done < self._config.steps:
            self._evaluations[done] = self._evaluate(state.params["policy"])
            self._display.evaluated(done, self._evaluations[done])
        self._clock = time.perf_counter()


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def _check(config: TrainConfig) -> None:
    c: dict[str, Any] = {name: value for name, value in vars(config).items() if value is not None}
    for name in ("steps", "prompts_per_step", "response_length", "accumulate", "scan", "eval_problems", "top_k"):
        if c.get(name, 1) < 1:
            raise ValueError(f"{_option(name)} must be at least 1, got {c[name]}")
    for name in ("learning_rate", "critic_learning_rate", "eval_every", "seed"):
        if not 0 <= c[name] < math.inf:
            raise ValueError(f"{_option(name)} must be a number and not negative, got {c[name]}")
    if not 0 < c["temperature"] < math.inf:
        raise ValueError(f"--temperature must be positive (greedy rollouts are all the same), got {c['temperature']}")
    for name in ("top_p", "min_p"):
        if not 0 < c.get(name, 1) <= 1:
            raise ValueError(f"{_option(name)} must be above 0 and at most 1, got {c[name]}")
    for name, whole in (("scan", "steps"), ("scan", "eval_every"), ("accumulate", "prompts_per_step")):
        if c[whole] % c[name]:
            raise ValueError(f"{_option(name)} {c[name]} must divide {_option(whole)} {c[whole]}")
    if config.scan > 1 and config.verify == "between":
        raise ValueError("--scan needs the step to be one program: --verify inside")
    if config.run.exists() and not config.run.is_dir():
        raise FileExistsError(f"--run {config.run} is a file")
    if (config.run / "metrics.jsonl").exists() and not config.overwrite:
        raise FileExistsError(f"{config.run} already holds a run: choose another --run, or pass --overwrite")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _task(config: TrainConfig, tokenizer: Any) -> Task:
    if config.task not in tasks.names():
        tasks.load(config.task)  # says which there are
    maker = getattr(import_module(f"jaxrl_llm.tasks.{config.task}"), config.task)
    takes = inspect.signature(maker).parameters
    options = arguments(maker, config.task_options, "--task-options")
    for option, value in (("data", config.data), ("skip_bad_rows", config.skip_bad_rows or None)):
        if value is not None and option not in takes:
            raise ValueError(f"{_option(option)}: task {config.task} reads no data")
        if value is not None:
            options[option] = value
    if "data" in takes and "data" not in options:
        raise ValueError(f"task {config.task} needs --data, the folder or file it reads")
    if tokenizer is not None and "tokenizer" in takes:
        options["tokenizer"] = tokenizer
    try:
        task = tasks.load(config.task, **options)
    except Exception as error:
        if type(error) is not Exception or tokenizer is None:
            raise
        # All that the tokenizers package raises.
        raise ValueError(f"the tokenizer in {config.policy} cannot read task {config.task!r}: {error}") from error
    if tokenizer is not None and task.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the policy in {config.policy} has another vocabulary than task {task.name!r}")
    return task


def _tokenizer(folder: Path) -> Any:
    """What `tokenizer.json` says, to the letter, unless the folder names a family's own class.

    For some model types AutoTokenizer puts its own rules in the place of those in the file.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        named = json.loads((folder / "tokenizer_config.json").read_text()).get("tokenizer_class")
    except FileNotFoundError:
        named = None
    plain = named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(str(folder), local_files_only=True)


def _small(vocab: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )


# --- the folder -------------------------------------------------------------------------------------------------------


def _folder(job: Job) -> Path:
    folder = job.config.run
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "transcripts.json", "curve.png"):
        (folder / name).unlink(missing_ok=True)
    packages = ("jaxrl_llm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    config = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(job.config).items()}
    _write(
        folder / "config.json",
        {
            "config": config,
            "recipe": describe(job.algorithm),
            "model": dataclasses.asdict(job.model) | {"dtype": np.dtype(job.model.dtype).name},
            "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
            "devices": [str(d) for d in jax.devices()],
        },
    )
    return folder


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return None


def _lines(folder: Path) -> IO[str]:
    return (folder / "metrics.jsonl").open("w")


def _write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(part, path)


def _short(evaluation: Evaluation) -> dict[str, float | None]:
    return {"accuracy": _finite(evaluation.accuracy), "reward": _finite(evaluation.reward)}


def _finite(x: Any) -> float | None:
    """JSON has no NaN."""
    return float(x) if math.isfinite(x) else None


def _headline(job: Job) -> str:
    size = 0 if job.params is None else sum(x.size for x in jax.tree.leaves(job.params))
    policy = f"{job.config.policy} ({size / 1e6:.2f} M parameters)" if size else "a small random policy"
    data = ""
    if (found := job.task.report) is not None:
        shown = [*found.skipped[:5], *(["..."] if len(found.skipped) > 5 else [])]
        data = "\n        ".join([f"\ndata    {found}", *shown])
    return f"policy  {policy}\nrecipe  {describe(job.algorithm)}{data}"
