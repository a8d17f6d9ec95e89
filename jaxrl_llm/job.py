"""The main job: what a user asks for, checked, and everything it names, found and read."""

from __future__ import annotations

import dataclasses
import inspect
import math
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxrl_llm import algorithms, checkpoint, distributed, folder, sharding, tasks
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.arguments import arguments
from jaxrl_llm.engine import learner
from jaxrl_llm.guard import guard
from jaxrl_llm.models import hf
from jaxrl_llm.models.heads import critic as critic_of
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.pretrained import tokenizer_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.tasks.isolated import Isolated
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Learner, PyTree, Sampling
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
    checkpoint_every: int = 100
    """Save the whole training state every so many steps, in the background; 0: at the end and when told to end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    keep_best: int = 1
    """How many of the best are kept besides: by held-out accuracy with --eval-every, else by reward since the last."""
    save_errors: Literal["stop", "continue"] = "stop"
    """A file that cannot be written (full disk, read-only folder) ends the run, or training goes on and tries later."""
    bad_updates: Literal["apply", "skip", "stop", "back"] = "apply"
    """An update that is not finite, or too large, is applied, left out, ends the run, or sends it to a checkpoint."""
    bad_norm: float | None = None
    """Gradient norm (before clipping) above which an update is too large; none: no bound."""
    verifier_timeout: float | None = None
    """Run a verifier on the host in a process of its own, and leave out responses it takes longer for, in seconds."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank on the policy's linear layers, instead of all weights (needs qwix)."""
    lora_alpha: float | None = None
    """The adapters' weight is this over their rank; none: twice the rank."""
    lora_targets: list[str] = dataclasses.field(default_factory=list)
    """Linear layers that get adapters, as --lora-targets q_proj v_proj; none named: all."""
    quantize: Literal["int8", "int4", "nf4"] | None = None
    """How the weights under adapters are held; none: as they are."""
    quantize_block: int | None = None
    """Inputs of a column of weights that share a scale; none: 64 with 4 bits, all with 8."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation and of the sampler's cache; weights and optimiser stay float32."""
    remat: str = TransformerConfig.remat or "none"
    """What a gradient keeps instead of computing it again: none (all is kept), full (nothing), or a name in
    jax.checkpoint_policies."""
    slots: int | None = None
    """Rows that decode at once, refilled as they finish: for responses of very different lengths; none: all."""
    pack: int = 1
    """Score and learn from packed responses in so many sizes, as language_model(sizes=): less padding is computed."""
    mesh: str | None = None
    """Devices along each axis, as data=2,fsdp=4,tensor=1, one of them -1 for the rest; none: one device."""
    split_tokens: bool = False
    """What a gradient keeps between layers is split over tensor by tokens: less memory, more exchanged."""
    distributed: bool = False
    """This process is one of several of the run: of a TPU slice, of Slurm, or as JAX_COORDINATOR_ADDRESS & co. say."""
    heartbeat: int = 60
    """Seconds after which a process that gives no sign of life ends the others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """A configuration with everything it names, found, read and checked. Made by `prepare`.

    data: sha256 of the files the task reads. resumed: whether it goes on where the run in the folder stopped.
    """

    config: TrainConfig
    algorithm: Algorithm
    task: Task
    model: TransformerConfig
    params: PyTree | None
    tokenizer: Any
    data: str | None = None
    resumed: bool = False
    mesh: Mesh | None = None


def prepare(config: TrainConfig, resumed: bool = False) -> Job:
    """Reads and checks all that a user can get wrong; trains nothing and writes nothing.

    Args:
      config: of a new run, or from `resumable`.
      resumed: the job goes on from the newest checkpoint in `config.run`, or from the start if there is none.

    Raises:
      ValueError: a name, number or argument in the configuration, a malformed row of the data (`DataError`), a policy
        that does not fit the task, or data that are not those the run began with.
      OSError: a file that is missing, or a run in the folder although `overwrite` is off (`FileExistsError`).
    """
    _check(config, resumed)
    mesh = _mesh(config)
    algorithm = algorithms.load(config.algorithm, **arguments(algorithms.recipe(config.algorithm), config.set, "--set"))
    if config.policy is None:
        task = _task(config, None)
        model, params, tokenizer = _small(len(task.tokenizer)), None, task.tokenizer
    else:
        model, params = hf.load(config.policy, sharding=None if mesh is None else sharding.of_weights(mesh))
        tokenizer = tokenizer_of(config.policy)
        task = _task(config, tokenizer)
        if model.vocab_size < len(tokenizer):
            known = f"the model knows {model.vocab_size} tokens, its tokenizer {len(tokenizer)}"
            raise ValueError(f"{config.policy}: {known}")
    kept = None if config.remat == "none" else config.remat
    model = dataclasses.replace(model, dtype=jnp.dtype(config.dtype), remat=kept, split_tokens=config.split_tokens)
    data = folder.digest(config.data)
    if resumed and data != (before := folder.written(config.run)["data"]):
        raise ValueError(f"--data {config.data} has changed since the run began: sha256 {before} then, {data} now")
    job = Job(
        config=config,
        algorithm=algorithm,
        task=task,
        model=model,
        params=params,
        tokenizer=tokenizer,
        data=data,
        resumed=resumed,
        mesh=mesh,
    )
    model_of(job)  # says what adapters do not fit
    return job


def resumable(run: Path, steps: int | None = None) -> TrainConfig:
    """The configuration of the run in a folder, to `prepare` with `resumed=True`.

    Args:
      run: the folder.
      steps: of the whole run, if it is to be another number.

    Raises:
      FileNotFoundError: there is no run.
      ValueError: `config.json` cannot be used, `steps` is below what was done, or nothing is left to do.
    """
    config = folder.configured(TrainConfig, run)
    config = config if steps is None else dataclasses.replace(config, steps=steps)
    done = max(checkpoint.Checkpoints(run / "checkpoints").steps(), default=0)
    if steps is not None and steps < done:
        raise ValueError(f"--steps {steps}: {run} has already taken {done} steps")
    if done == config.steps and (run / "summary.json").exists():
        raise ValueError(f"{run} has taken all of its {done} steps: --steps N goes on to N")
    return config


def model_of(job: Job) -> Model:
    """The policy's network, with adapters if the configuration asks for them.

    Raises:
      ValueError: adapters that do not fit it.
      ImportError: qwix is missing.
    """
    c, model = job.config, transformer(job.model)
    if c.lora_rank is None:
        return model
    kept: dict[str, Any] = {"quantize": c.quantize, "block_size": c.quantize_block}
    try:
        return lora(model, rank=c.lora_rank, alpha=alpha_of(c), targets=c.lora_targets or None, **kept)
    except ValueError as error:
        options = "--lora-rank, --lora-alpha, --lora-targets, --quantize and --quantize-block"
        raise ValueError(f"{options} do not fit the policy: {error}") from error


def alpha_of(config: TrainConfig) -> float:
    """That of the adapters."""
    return 2.0 * (config.lora_rank or 0) if config.lora_alpha is None else config.lora_alpha


def learner_of(job: Job) -> Learner:
    """The job's training step; with it, its checkpoint can be read."""
    config, model = job.config, model_of(job)
    plain = learner(
        job.algorithm,
        policy=language_model(model, slots=config.slots, sizes=config.pack),
        task=job.task,
        params=job.params,
        critic=critic_of(model),
        optimizer=adamw(config.learning_rate),
        critic_optimizer=adamw(config.critic_learning_rate),
        prompts_per_step=config.prompts_per_step,
        response_length=config.response_length,
        sampling=sampling_of(config),
        accumulate=config.accumulate,
        verify=config.verify,
        mesh=job.mesh,
    )
    if config.bad_updates == "apply":
        return plain
    return guard(plain, max_norm=math.inf if config.bad_norm is None else config.bad_norm)


def sampling_of(config: TrainConfig) -> Sampling:
    """The behaviour distribution."""
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def _check(config: TrainConfig, resumed: bool) -> None:
    c: dict[str, Any] = {name: value for name, value in vars(config).items() if value is not None}
    for name in (
        "steps",
        "prompts_per_step",
        "response_length",
        "slots",
        "pack",
        "accumulate",
        "scan",
        "eval_problems",
        "top_k",
        "heartbeat",
    ):
        if c.get(name, 1) < 1:
            raise ValueError(f"{_option(name)} must be at least 1, got {c[name]}")
    if c["keep_checkpoints"] < 1:
        raise ValueError(f"--keep-checkpoints must be at least 1, got {c['keep_checkpoints']}")
    for name in ("learning_rate", "critic_learning_rate", "eval_every", "seed", "checkpoint_every", "keep_best"):
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
    for name in ("bad_norm", "verifier_timeout"):
        if not 0 < c.get(name, 1) < math.inf:
            raise ValueError(f"{_option(name)} must be a positive number, got {c[name]}")
    given = [name for name in ("lora_alpha", "lora_targets", "quantize", "quantize_block") if c.get(name, []) != []]
    if given and config.lora_rank is None:
        raise ValueError(f"{_option(given[0])} is of adapters: say their rank, --lora-rank N")
    if config.bad_updates == "apply" and config.bad_norm is not None:
        raise ValueError("--bad-norm says which updates are bad: --bad-updates skip, stop or back")
    if config.split_tokens:
        sharding.check_split_tokens(config.mesh)
    if config.bad_updates == "back" and not config.checkpoint_every:
        raise ValueError("--bad-updates back needs checkpoints to go back to: --checkpoint-every N")
    if (config.run / "metrics.jsonl").exists() and not (config.overwrite or resumed):
        already = f"{config.run} already holds a run: choose another --run, or pass --overwrite"
        raise FileExistsError(f"{already}, or go on with it: jaxrl-llm resume {config.run}")


def _mesh(config: TrainConfig) -> Mesh | None:
    sizes: dict[str, Any] = {"data": -1} if config.mesh is None else sharding.parse(config.mesh)
    if config.distributed:
        distributed.start(heartbeat=config.heartbeat)
    elif config.mesh is None:
        return None
    mesh = sharding.mesh(**sizes)
    distributed.meet(mesh)
    return mesh


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
    if config.verifier_timeout is None:
        return task
    if task.verify is not None:
        raise ValueError(f"--verifier-timeout: the verifier of task {task.name} is part of the step and cannot hang")
    return dataclasses.replace(task, grade=Isolated(task.grade, config.verifier_timeout))


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
