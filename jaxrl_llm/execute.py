"""A job's execution: train, evaluate, save, and leave a folder that tells all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxrl_llm import checkpoint, distributed, folder, report, sharding
from jaxrl_llm.algorithm import describe
from jaxrl_llm.evaluate import Evaluation, evaluator
from jaxrl_llm.job import Job, TrainConfig, alpha_of, learner_of, model_of, prepare, sampling_of
from jaxrl_llm.models import hf, peft
from jaxrl_llm.policy import language_model
from jaxrl_llm.progress import Display
from jaxrl_llm.run import run
from jaxrl_llm.types import Learner, TrainState
from jaxrl_llm.watch import GoBack, Plan, Preemption, Record, Watch, finite


def train(config: TrainConfig) -> dict[str, Any]:
    """`execute(prepare(config))`."""
    return execute(prepare(config))


def execute(job: Job) -> dict[str, Any]:
    """Trains; everything there is to know is in the folder `config.run` afterwards (see `folder`).

    `metrics.jsonl` has a line a step; `seconds` is training time so far, compilation included, evaluation not. In
    several processes the first one writes all files but the shards of checkpoints.

    Returns:
      what `summary.json` holds: `before` and `after` with `accuracy` (greedy) and `reward` (mean, sampled as in
      training), `train_seconds`, `seed` and more.

    Raises:
      Preempted: the process was told to end (SIGTERM); a checkpoint was saved.
      BadUpdate: an update was bad, and the configuration says to end then.
      SaveError: a file could not be written, and the configuration says to end then, or it was one of the results.
      BlockingIOError: another process is training into the folder.
    """
    config, first = job.config, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if first:
            stack.enter_context(folder.claimed(config.run))
        preemption = stack.enter_context(Preemption().listening())
        display = stack.enter_context(
            Display(config.steps, title=f"{config.algorithm} on {job.task.name}", quiet=not first)
        )
        display.say(_headline(job))
        beside = _begin(job, display)
        kept = {"keep": config.keep_checkpoints, "best": config.keep_best}
        checkpoints = stack.enter_context(checkpoint.Checkpoints(config.run / "checkpoints", say=display.say, **kept))
        parts = learner_of(job)
        state, record = _start(job, parts, checkpoints, display)
        lines = stack.enter_context(folder.Lines(config.run / "metrics.jsonl" if first else None, keep=record.step))
        watch = _watch(
            job,
            record=record,
            beside=beside,
            lines=lines,
            display=display,
            checkpoints=checkpoints,
            preemption=preemption,
        )
        state = _train(job, parts, state, watch)
        return _finish(job, state, watch.record, display)


def _watch(job: Job, **parts: Any) -> Watch:
    """What happens between two programs of this job."""
    config, task, policy = job.config, job.task, language_model(model_of(job))
    evaluate = evaluator(
        policy,
        task,
        problems=config.eval_problems,
        response_length=config.response_length,
        sampling=sampling_of(config),
        mesh=job.mesh,
    )
    return Watch(
        Plan(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Plan)}),
        log=functools.partial(_log, job),
        evaluate=lambda params: evaluate(policy.whole(params)),
        counts=getattr(task.grade, "counts", None),
        **parts,
    )


def _begin(job: Job, display: Display) -> dict[str, Any]:
    """Writes `config.json`; what of it stands beside every checkpoint."""
    path = job.config.run
    found = {"config": folder.plain(job.config), "data": job.data, **folder.surroundings()}
    if jax.process_index() == 0:
        if job.resumed:
            if differ := folder.changed(folder.written(path)["versions"], found["versions"]):
                display.say(f"other versions than before, steps may differ in the last bits: {'; '.join(differ)}")
        else:
            folder.clear(path)
        model = dataclasses.asdict(job.model) | {"dtype": np.dtype(job.model.dtype).name}
        folder.write(path / "config.json", {**found, "recipe": describe(job.algorithm), "model": model})
    return found


def _start(
    job: Job, parts: Learner, checkpoints: checkpoint.Checkpoints, display: Display
) -> tuple[TrainState, Record]:
    """The state to go on from, and what was known then."""
    mesh, key = job.mesh, jax.random.key(job.config.seed)
    like = jax.eval_shape(parts.init, key)
    saved = checkpoints.restore(like if mesh is None else sharding.shaped(mesh, like)) if job.resumed else None
    if saved is None:
        _log(job, "started", steps=job.config.steps)
        if mesh is not None:
            return sharding.place_state(mesh, parts.init(key)), Record()
        # Weights that were read would be constants of the program.
        return (jax.jit(parts.init) if job.params is None else parts.init)(key), Record()
    checkpoints.forget(after=saved.step)  # damaged ones
    display.say(f"going on from step {saved.step}")
    _log(job, "resumed", step=saved.step, steps=job.config.steps)
    return saved.state, Record.of(saved.run)


def _train(job: Job, parts: Learner, state: TrainState, watch: Watch) -> TrainState:
    """The steps that are left, and the evaluations around them."""
    config, every = job.config, job.config.eval_every
    step = watch.record.step
    if step not in watch.record.evaluations and (step == 0 or (every and step % every == 0 and step < config.steps)):
        watch.evaluate(state)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    while (left := config.steps - watch.record.step) > 0:
        prompts = None
        if job.task.batches is not None:
            drawn = config.seed, config.prompts_per_step, watch.record.cursor
            prompts = job.task.batches(*drawn) if job.mesh is None else distributed.batches(job.mesh, job.task, *drawn)
        try:
            state, _ = run(parts, None, left, state=state, prompts=prompts, scan=config.scan, each=watch)
        except GoBack:
            state = watch.back(like)
    watch.save(state, wait=True, must=True)
    if config.steps not in watch.record.evaluations:
        watch.evaluate(state)
    return state


def _finish(job: Job, state: TrainState, record: Record, display: Display) -> dict[str, Any]:
    """The results, the summary last."""
    config, path = job.config, job.config.run
    before, after = record.evaluations[0], record.evaluations[config.steps]
    summary = {
        "before": _short(before),
        "after": _short(after),
        "train_seconds": round(record.seconds, 2),
        "seed": config.seed,
        "steps": config.steps,
        "problems": before.problems,
        "evaluations": {str(step): _short(e) for step, e in record.evaluations.items()},
    }
    weights = distributed.on_host({role: x for role, x in state.params.items() if role in ("base", "policy")})
    if jax.process_index() == 0:
        try:
            _write_policy(job, weights)
            folder.write(path / "transcripts.json", finite({"before": before.transcripts, "after": after.transcripts}))
            folder.write(path / "summary.json", summary)
            report.curve(path)
        except OSError as error:
            hint = "the checkpoint is complete: with room on the disk, jaxrl-llm resume writes the results"
            raise checkpoint.SaveError(f"{error}; {hint}") from error
    _log(job, "finished", step=config.steps)
    display.transcripts(before, after)
    display.outcome(before, after, record.seconds, path)
    return summary


def _write_policy(job: Job, weights: dict[str, Any]) -> None:
    """A folder that needs nothing else; of adapters, merged, and the adapters in one of their own."""
    params, path, adapter = weights["policy"], job.config.run, model_of(job).adapter
    if adapter is not None:
        base = None if job.config.policy is None else str(job.config.policy.absolute())
        peft.save(path / "adapters", params, alpha=alpha_of(job.config), base=base)
        params = jax.device_get(jax.jit(adapter.merge)(weights["base"], params))
    hf.save(path / "policy", job.model, params, tokenizer=job.tokenizer)


def _log(job: Job, what: str, **values: Any) -> None:
    if jax.process_index() == 0:
        folder.event(job.config.run, what, **values)


def _short(evaluation: Evaluation) -> dict[str, float | None]:
    return {"accuracy": finite(evaluation.accuracy), "reward": finite(evaluation.reward)}


def _headline(job: Job) -> str:
    size = 0 if job.params is None else sum(x.size for x in jax.tree.leaves(job.params))
    policy = f"{job.config.policy} ({size / 1e6:.2f} M parameters)" if size else "a small random policy"
    data = ""
    if (found := job.task.report) is not None:
        shown = [*found.skipped[:5], *(["..."] if len(found.skipped) > 5 else [])]
        data = "\n        ".join([f"\ndata    {found}", *shown])
    return f"policy  {policy}\nrecipe  {describe(job.algorithm)}{data}"
