"""The runs that scripts/faults.py breaks: how they start, and whether they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS, EVERY, LONG = 60, 7, 600  # steps of a run and between checkpoints; of a run that has to last
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def troubled(prompts: list[str], completions: list[str], *, answer: list[str], fault: str = "") -> list[Any]:
    """1 for an answer that occurs in the response; misbehaves on responses with a "3" in them."""
    found: list[Any] = []
    for text, right in zip(completions, answer, strict=True):
        if "3" in text and fault == "hangs":
            while True:
                time.sleep(1)
        if "3" in text and fault == "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        if "3" in text and fault == "raises":
            raise RuntimeError("no such answer")
        found.append("yes" if "3" in text and fault == "talks nonsense" else float(str(right) in text))
    return found


def child(options: dict[str, Any]) -> None:
    """A job that a command line cannot say: other policies, recipes and verifiers."""
    import jax
    import jax.numpy as jnp

    from jaxrl_llm import cli, engine, evaluate, execute, job, tasks
    from jaxrl_llm.models.transformer import transformer
    from jaxrl_llm.policy import language_model
    from jaxrl_llm.tasks.isolated import Isolated

    model, slots, trouble = options.pop("model"), options.pop("slots", None), options.pop("trouble", None)
    fault, resumed = options.pop("fault", None), options.pop("resumed", False)
    paths = {name: Path(options.pop(name)) for name in ("policy", "data", "run") if name in options}
    config = job.TrainConfig(**options, **paths)
    prepared = job.prepare(job.resumable(config.run) if resumed else config, resumed=resumed)
    if fault is not None:
        import fault_runs  # by a name that the verifier's process can import

        grade = Isolated(functools.partial(fault_runs.troubled, fault=fault), 5.0)
        rows = {**config.task_options, "tokenizer": prepared.tokenizer, "grade": grade}
        prepared = dataclasses.replace(prepared, task=tasks.load("jsonl", data=config.data, **rows))
    if model == "numbers":
        execute.learner_of = functools.partial(numbers, size=trouble)  # type: ignore[assignment]
    if slots is not None:
        policy = language_model(transformer(prepared.model), slots=slots)
        execute.learner_of = lambda job: engine.learner(  # type: ignore[assignment]
            job.algorithm,
            policy=policy,
            task=job.task,
            params=job.params,
            prompts_per_step=config.prompts_per_step,
            response_length=config.response_length,
        )
    if fault is None:
        # A number of the policy, and no picture: they would be most of such a short run.
        def evaluation(params: Any) -> evaluate.Evaluation:
            norm = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(params)))
            return evaluate.Evaluation(norm, norm, 1.0, 1, [{"prompt": "", "response": "", "reward": norm}])

        execute.evaluator = lambda *_, **__: evaluation  # type: ignore[assignment]
        execute.report.curve = lambda _: None
        execute.hf.save = lambda *_, **__: None
    cli.attempt(prepared)


def numbers(job: Any, *, size: str | None) -> Any:
    """A learner of a few thousand numbers, with key, data, memory and optimiser: the run around it is the real one.

    A language model's step would take seconds to trace in every process. `size`: of a gradient that is too large where
    a draw says so.
    """
    import jax
    import jax.numpy as jnp
    import optax

    from jaxrl_llm.guard import guard
    from jaxrl_llm.types import Learner, Sampling, TrainState

    adam = optax.adam(1e-2)

    def init(key: Any) -> TrainState:
        params = {"w": jax.random.normal(key, (64, 64)), "b": jnp.zeros(64)}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.fold_in(key, 1),
            params={"policy": params},
            opt_state={"policy": adam.init(params)},
            memory={"prompt": jnp.zeros(job.task.rows, jnp.int32), "rollout": jnp.zeros((0, 3))},
            numbers={},
            sampling=Sampling(temperature=jnp.ones(())),
        )

    def step(state: TrainState, prompts: Any) -> tuple[TrainState, dict[str, Any]]:
        draw, bad, noise = jax.random.split(jax.random.fold_in(state.key, state.step), 3)
        prompts = job.task.draw(draw, job.config.prompts_per_step) if prompts is None else prompts
        x = jax.random.normal(noise, (len(prompts.index), 64)) + prompts.index[:, None]
        params = state.params["policy"]
        loss, slope = jax.value_and_grad(lambda p: jnp.tanh(x @ p["w"] + p["b"]).mean())(params)
        if size is not None:
            factor = jnp.where(jax.random.uniform(bad) < 0.1, {"NaN": jnp.nan, "Inf": jnp.inf, "huge": 1e9}[size], 1.0)
            slope = jax.tree.map(lambda g: g * factor, slope)
        change, opt_state = adam.update(slope, state.opt_state["policy"], params)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(slope), "reward/mean": -loss, "entropy": -loss}
        metrics |= {"length/mean": x.sum(), "tokens/generated": jnp.float32(len(x))}
        memory = {**state.memory, "prompt": state.memory["prompt"].at[prompts.index].add(1)}
        new = {"params": {"policy": optax.apply_updates(params, change)}, "opt_state": {"policy": opt_state}}
        return dataclasses.replace(state, step=state.step + 1, memory=memory, **new), metrics

    plain = Learner(init, step)
    return plain if job.config.bad_updates == "apply" else guard(plain, max_norm=job.config.bad_norm or float("inf"))


class Bench:
    """A folder with policy, data and compiled programs, and the undisturbed runs to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._whole, self._runs = folder, {}, 0
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])}
        self.environment = {**os.environ, **cache, **paths, "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
        rows = [json.dumps({"prompt": f"number {i}", "answer": i % 3}) for i in range(37)]
        (folder / "data.jsonl").write_text("\n".join(rows))

    def policy(self) -> Path:
        """The smallest language model there is."""
        folder = self.folder / "policy"
        if not folder.exists():
            import jax

            from jaxrl_llm.models import hf
            from jaxrl_llm.models.transformer import TransformerConfig, transformer
            from jaxrl_llm.tasks.host import byte_pair_tokenizer

            sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
            config = TransformerConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
            params = jax.device_get(transformer(config).init(jax.random.key(0)))
            hf.save(folder, config, params, tokenizer=byte_pair_tokenizer(["0 1 2"], 258))
        return folder

    def options(self, run: Path, **changes: Any) -> dict[str, Any]:
        """Of a small run on rows of a file, whose programs are shared by all."""
        found = {
            "task": "jsonl",
            "task_options": {"response_length": 8, "prompt_length": 12},
            "algorithm": "grpo",
            "set": {"group_size": 8, "kl": None},
            "steps": STEPS,
            "checkpoint_every": EVERY,
            "eval_problems": 2,
            "learning_rate": 1e-3,
            "prompts_per_step": 4,
            "data": str(self.folder / "data.jsonl"),
            "run": str(run),
            "model": "numbers",
        }
        if changes.get("model") == "language":
            found["policy"] = str(self.policy())
        return found | changes

    def place(self) -> Path:
        """Of a new run."""
        self._runs += 1
        return self.folder / "runs" / str(self._runs)

    def start(self, run: Path, limit: int | None = None, **changes: Any) -> subprocess.Popen[str]:
        """A new run, or with `resumed=True` the rest of one; `limit` is the most bytes a file may have."""
        line = [sys.executable, __file__, json.dumps(self.options(run, **changes))]
        line = line if limit is None else ["prlimit", f"--fsize={limit}", *line]
        return subprocess.Popen(line, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def together(self, run: Path, processes: int = 2, **changes: Any) -> list[subprocess.Popen[str]]:
        """As `start`, in several processes of one device each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        line = [sys.executable, __file__, json.dumps(self.options(run, **changes, distributed=True))]
        shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes), "JAX_NUM_CPU_DEVICES": "1"}
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return [
            subprocess.Popen(line, env={**self.environment, **shared, "JAX_PROCESS_ID": str(i)}, **options)
            for i in range(processes)
        ]

    def whole(self, **changes: Any) -> Path:
        """The undisturbed run with these options."""
        name = json.dumps(changes, sort_keys=True)
        if name not in self._whole:
            self._whole[name] = run = self.place()
            done(self.start(run, **changes))
        return self._whole[name]


def done(process: subprocess.Popen[str], status: int = 0) -> str:
    """All it said; its exit status must be the one given."""
    out, error = process.communicate(timeout=3600)
    if process.returncode != status:
        raise AssertionError(f"exit status {process.returncode}, not {status}: {out[-1500:]}{error[-3000:]}")
    return out + error


def lines(run: Path) -> list[dict[str, Any]]:
    """Of all steps, without their seconds; raises if one is missing, doubled or torn."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1)), [line["step"] for line in found]
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def count(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def steps_of(run: Path) -> list[int]:
    """Its checkpoints."""
    folder = run / "checkpoints"
    return [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []


def wait(process: subprocess.Popen[str], until: Callable[[], Any]) -> bool:
    """Whether it came to that before the process ended."""
    while not until():
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def check_equal(run: Path, whole: Path) -> None:
    """Lines, the summary, and arrays of the last checkpoint."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    check_said(run, whole)
    a, b = (ocp.load(path / "checkpoints" / str(len(lines(whole)))) for path in (run, whole))
    assert a.keys() == b.keys()
    for name in a:
        x, y = (jax.random.key_data(s[name]) if name == ".key" else np.asarray(s[name]) for s in (a, b))
        np.testing.assert_array_equal(x, y, err_msg=name)


def check_said(run: Path, whole: Path) -> None:
    """Lines, and the summary, whose evaluation is a sum over all parameters."""
    assert lines(run) == lines(whole)
    summaries = [json.loads((path / "summary.json").read_text()) | {"train_seconds": 0} for path in (run, whole)]
    assert summaries[0] == summaries[1]


def whole_checkpoints(run: Path) -> None:
    """Every checkpoint under its name is complete and as it was written."""
    from orbax.checkpoint import v1 as ocp

    from jaxrl_llm.checkpoint import Checkpoints, damaged

    for step in Checkpoints(run / "checkpoints").steps():
        assert not damaged(run / "checkpoints" / str(step)), step
        ocp.load(run / "checkpoints" / str(step))


@contextlib.contextmanager
def small_disk(bench: Bench, size: str = "1m") -> Iterator[Path | None]:
    """A tmpfs; None where it cannot be mounted."""
    place = bench.place()
    place.mkdir(parents=True)
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=False, capture_output=True
    ).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


if __name__ == "__main__":
    child(json.loads(sys.argv[1]))
