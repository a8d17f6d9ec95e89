"""The runs that scripts/faults.py breaks: how they start, and whether they end as if nothing had happened."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import signal
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

    trouble, slots = options.pop("trouble", None), options.pop("slots", None)
    fault, resumed = options.pop("fault", None), options.pop("resumed", False)
    paths = {name: Path(options.pop(name)) for name in ("policy", "data", "run")}
    config = job.TrainConfig(**options, **paths)
    prepared = job.prepare(job.resumable(config.run) if resumed else config, resumed=resumed)

    if fault is not None:
        import fault_runs  # by a name that the verifier's process can import

        grade = Isolated(functools.partial(fault_runs.troubled, fault=fault), 1.0)
        rows = {**config.task_options, "tokenizer": prepared.tokenizer, "grade": grade}
        prepared = dataclasses.replace(prepared, task=tasks.load("jsonl", data=config.data, **rows))
    if trouble is not None:
        size, rate = {"NaN": (jnp.nan, 0.2), "Inf": (jnp.inf, 0.2), "huge": (1e6, 0.2)}[trouble]

        def term(scores: Any, batch: Any) -> Any:
            bad = jax.random.uniform(jax.random.fold_in(jax.random.key(5), batch.prompts.index[0])) < rate
            return jnp.where(bad, size, 0.0) * scores.logp

        loss = dataclasses.replace(prepared.algorithm.loss, terms=(term,))
        prepared = dataclasses.replace(prepared, algorithm=dataclasses.replace(prepared.algorithm, loss=loss))
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
    cli.attempt(prepared)


class Bench:
    """A folder with policy, data and compiled programs, and the undisturbed runs to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._whole, self._runs = folder, {}, 0
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])}
        self.environment = {**os.environ, **cache, **paths, "XLA_FLAGS": FAST, "JAX_PLATFORMS": "cpu"}
        rows = [json.dumps({"prompt": f"number {i}", "answer": i % 3}) for i in range(37)]
        (folder / "data.jsonl").write_text("\n".join(rows))
        code = (
            "import sys, jax; from jaxrl_llm.models import hf\n"
            "from jaxrl_llm.models.transformer import TransformerConfig, transformer\n"
            "from jaxrl_llm.tasks.host import byte_pair_tokenizer\n"
            "c = TransformerConfig(vocab_size=258, hidden_size=16, intermediate_size=32, num_hidden_layers=1,"
            " num_attention_heads=2, num_key_value_heads=1, head_dim=8)\n"
            "p = jax.device_get(transformer(c).init(jax.random.key(0)))\n"
            "hf.save(sys.argv[1], c, p, tokenizer=byte_pair_tokenizer(['0 1 2'], 258))\n"
        )
        subprocess.run(
            [sys.executable, "-c", code, str(folder / "policy")], env=self.environment, check=True, capture_output=True
        )

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
            "policy": str(self.folder / "policy"),
            "data": str(self.folder / "data.jsonl"),
            "run": str(run),
        }
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

    def whole(self, **changes: Any) -> Path:
        """The undisturbed run with these options."""
        name = json.dumps(changes, sort_keys=True)
        if name not in self._whole:
            self._whole[name] = run = self.place()
            done(self.start(run, **changes))
        return self._whole[name]


def done(process: subprocess.Popen[str], status: int = 0) -> str:
    """All it said; its exit status must be the one given."""
    out, error = process.communicate(timeout=600)
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
    """Lines, arrays of the last checkpoint, and the summary."""
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    assert lines(run) == lines(whole)
    a, b = (ocp.load(path / "checkpoints" / str(len(lines(whole)))) for path in (run, whole))
    assert a.keys() == b.keys()
    for name in a:
        x, y = (jax.random.key_data(s[name]) if name == ".key" else np.asarray(s[name]) for s in (a, b))
        np.testing.assert_array_equal(x, y, err_msg=name)
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
