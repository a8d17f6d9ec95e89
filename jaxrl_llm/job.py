"""The main job: load a policy, train it on a task, evaluate it, and leave a folder that tells all."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms, checkpoint, tasks
from jaxrl_llm.algorithm import Algorithm, describe
from jaxrl_llm.engine import learner
from jaxrl_llm.evaluate import Evaluation, evaluator
from jaxrl_llm.models import hf
from jaxrl_llm.models.heads import critic as critic_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.progress import Display
from jaxrl_llm.run import run
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts, Sampling, TrainState
from jaxrl_llm.updates.optimizer import adamw

SHIPPED = Path(__file__).parent / "data" / "quickstart"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a policy by reinforcement learning on a task with a verifier."""

    task: str = "arithmetic"
    """Name of a task in jaxrl_llm/tasks."""
    data: Path | None = None
    """Folder or file the task reads, if it reads any (gsm8k: a folder with train.jsonl and test.jsonl)."""
    task_options: dict[str, str] = dataclasses.field(default_factory=dict)
    """Further arguments of the task: name value pairs."""
    skip_bad_rows: bool = False
    """Leave out malformed rows of the data and say how many, instead of stopping."""
    algorithm: str = "grpo"
    """Name of a recipe in jaxrl_llm/algorithms."""
    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Arguments of the recipe: name value pairs, e.g. group_size 8."""
    policy: Path | None = None
    """Hugging Face folder of the policy (config.json, model.safetensors, tokenizer.json). None: a small random one."""
    run: Path = Path("runs/train")
    """Folder the run leaves behind."""
    overwrite: bool = False
    """Replace what an earlier run left in the folder."""
    steps: int = 200
    """Optimiser steps of the outer loop."""
    prompts_per_step: int = 8
    """Prompts per step; each gets a group of rollouts."""
    response_length: int | None = None
    """Tokens a response may have. None: the task's."""
    learning_rate: float = 1e-6
    """AdamW's learning rate for the policy."""
    critic_learning_rate: float = 1e-5
    """AdamW's learning rate for the critic, if the recipe has one."""
    temperature: float = 1.0
    """Of sampling in training; evaluation is greedy."""
    top_k: int | None = None
    """Keep the k most probable tokens."""
    top_p: float | None = None
    """Keep the most probable tokens that hold this much probability."""
    min_p: float | None = None
    """Keep tokens at least this probable, relative to the most probable one."""
    accumulate: int = 1
    """Micro-batches per optimiser step: less memory, same result."""
    scan: int = 1
    """Steps per compiled program."""
    verify: Literal["inside", "between"] = "inside"
    """Where a verifier that runs on the host is asked: inside the one program, or between two."""
    eval_problems: int = 512
    """Held-out problems, answered greedily before and after."""
    eval_every: int = 0
    """Also evaluate every so many steps; 0: only before and after."""
    seed: int = 0
    """Decides everything random."""


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs the job; everything it learns is in the folder `config.run`.

    Writes `config.json` (the exact configuration, the recipe as an expression, versions), `metrics.jsonl` (a line a step),
    `summary.json`, `transcripts.json`, `checkpoint/` (the whole training state), `policy/` (the trained policy as a
    Hugging Face folder), and `curve.png` where matplotlib is installed.

    Returns:
      what `summary.json` holds: `before` and `after` with `accuracy` and `reward`, `train_seconds`, `seed`.

    Raises:
      FileExistsError: the folder holds a run and `overwrite` is off.
      DataError: a malformed row of the data (before anything is trained).
    """
    algorithm = algorithms.load(config.algorithm, **_parsed(config.set))
    model_config, params, tokenizer = _policy(config)
    task = _task(config, tokenizer)
    if model_config is None:
        model_config, tokenizer = _small(len(task.tokenizer)), task.tokenizer
    folder = _prepare(config, algorithm)
    model = transformer(model_config)
    policy = language_model(model)
    parts = learner(
        algorithm,
        policy=policy,
        task=task,
        params=params,
        critic=critic_of(model),
        optimizer=adamw(config.learning_rate),
        critic_optimizer=adamw(config.critic_learning_rate),
        prompts_per_step=config.prompts_per_step,
        response_length=config.response_length,
        sampling=Sampling(
            temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p
        ),
        accumulate=config.accumulate,
        verify=config.verify,
    )
    evaluate = evaluator(policy, task, problems=config.eval_problems, response_length=config.response_length)
    state = jax.jit(parts.init)(jax.random.key(config.seed)) if parts.compiled else parts.init(jax.random.key(config.seed))

    evaluations = {0: evaluate(state.params["policy"])}
    seconds = 0.0
    with Display(config.steps, title=f"{config.algorithm} on {task.name}") as display, _lines(folder) as log:
        display.evaluated(0, evaluations[0])
        if task.report is not None:
            display.say(f"data: {task.report}")
        clock = time.perf_counter()

        def each(done: int, state: TrainState, metrics: dict[str, jax.Array]) -> None:
            nonlocal seconds, clock
            values = {name: np.asarray(x) for name, x in metrics.items()}
            spent, first = time.perf_counter() - clock, done - len(values["loss"])
            seconds += spent
            for i in range(len(values["loss"])):
                line = {"step": first + i + 1, "seconds": seconds} | {k: float(v[i]) for k, v in values.items()}
                log.write(json.dumps(line) + "\n")
            log.flush()
            display.stepped(done, line, spent / len(values["loss"]))
            if config.eval_every and done % config.eval_every == 0 and done < config.steps:
                evaluations[done] = evaluate(state.params["policy"])
                display.evaluated(done, evaluations[done])
            clock = time.perf_counter()

        state, _ = run(
            parts, None, config.steps, state=state, prompts=_prompts(task, config), scan=config.scan, each=each
        )
        evaluations[config.steps] = evaluate(state.params["policy"])
        display.evaluated(config.steps, evaluations[config.steps])
        before, after = evaluations[0], evaluations[config.steps]
        display.transcripts(before, after)

    checkpoint.save(folder / "checkpoint", state)
    hf.save(folder / "policy", model_config, jax.device_get(state.params["policy"]), tokenizer=tokenizer)
    summary = {
        "before": _short(before),
        "after": _short(after),
        "train_seconds": round(seconds, 2),
        "seed": config.seed,
        "steps": config.steps,
        "problems": before.problems,
        "evaluations": {step: _short(e) for step, e in evaluations.items()},
    }
    _write(folder / "transcripts.json", {"before": before.transcripts, "after": after.transcripts})
    _write(folder / "summary.json", summary)
    _curve(folder, evaluations)
    return summary


def _policy(config: TrainConfig) -> tuple[TransformerConfig | None, Any, Any]:
    if config.policy is None:
        return None, None, None
    from transformers import AutoTokenizer

    model_config, params = hf.load(config.policy)
    return model_config, params, AutoTokenizer.from_pretrained(str(config.policy))


def _task(config: TrainConfig, tokenizer: Any) -> Task:
    options: dict[str, Any] = _parsed(config.task_options)
    if config.data is not None:
        options |= {"data": config.data, "skip_bad_rows": config.skip_bad_rows}
        if tokenizer is not None:
            options["tokenizer"] = tokenizer
    elif config.skip_bad_rows:
        raise ValueError("--skip-bad-rows needs --data: this task reads no rows")
    task = tasks.load(config.task, **options)
    if tokenizer is not None and task.tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the policy in {config.policy} has another vocabulary than task {task.name!r}")
    return task


def _small(vocab: int) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        qkv_bias=True,
    )


def _prompts(task: Task, config: TrainConfig) -> Iterator[Prompts] | None:
    return None if task.batches is None else task.batches(config.seed, config.prompts_per_step)


def _parsed(options: dict[str, str]) -> dict[str, Any]:
    """Values as JSON where they are (numbers, true, null), as text where they are not."""

    def parse(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    return {name: parse(text) if isinstance(text, str) else text for name, text in options.items()}


def _prepare(config: TrainConfig, algorithm: Algorithm) -> Path:
    folder = config.run
    if (folder / "metrics.jsonl").exists() and not config.overwrite:
        raise FileExistsError(f"{folder} already holds a run: choose another --run, or pass --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("summary.json", "transcripts.json", "curve.png"):
        (folder / name).unlink(missing_ok=True)
    packages = ("jaxrl_llm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
    _write(
        folder / "config.json",
        {
            "config": {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(config).items()},
            "recipe": describe(algorithm),
            "versions": {name: metadata.version(name) for name in packages} | {"python": platform.python_version()},
            "devices": [str(d) for d in jax.devices()],
        },
    )
    return folder


def _lines(folder: Path) -> Any:
    return (folder / "metrics.jsonl").open("w")


def _write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    os.replace(part, path)


def _short(evaluation: Evaluation) -> dict[str, float]:
    return {"accuracy": evaluation.accuracy, "reward": evaluation.reward}


def _curve(folder: Path, evaluations: dict[int, Evaluation]) -> None:
    """`curve.png`: reward in training, accuracy on held-out problems."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    steps = [row["step"] for row in rows]
    axes[0].plot(steps, [row["reward/mean"] for row in rows], lw=0.8, label="mean reward of rollouts")
    axes[0].plot(list(evaluations), [e.accuracy for e in evaluations.values()], "o-", label="held-out greedy accuracy")
    axes[0].set(xlabel="step", ylim=(-0.02, 1.02))
    axes[1].plot(steps, [row["entropy"] for row in rows], lw=0.8, label="entropy (nats)")
    axes[1].plot(steps, [row["zero_variance_groups"] for row in rows], lw=0.8, label="groups without variance")
    axes[1].set(xlabel="step")
    for axis in axes:
        axis.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=120)
    plt.close(figure)
