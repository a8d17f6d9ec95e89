"""Which runs there are, and how they stand: read from their folders alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from jaxrl_llm import folder as files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standing:
    """How a run stands. `reward`: mean of the last step's rollouts; `accuracy`: of the last evaluation; `age`: seconds
    since something was written; `checkpoint`: the newest step that can be resumed from, 0 for none."""

    run: str
    algorithm: str
    task: str
    step: int
    steps: int
    reward: float | None
    accuracy: float | None
    checkpoint: int
    state: Literal["running", "finished", "interrupted"]
    age: float


def standings(root: Path) -> list[Standing]:
    """The runs in and under a folder, the one written to last first.

    Raises:
      FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    return sorted((standing(path, root) for path in _found(root)), key=lambda run: run.age)


def standing(path: Path, root: Path) -> Standing:
    """How the run in `path` stands, named from `root`."""
    config = files.written(path)["config"]
    last = _last_line(path / "metrics.jsonl")
    accuracies = [e["accuracy"] for e in files.events(path) if e["event"] == "evaluated"]
    saved = [int(p.name) for p in (path / "checkpoints").glob("*") if p.name.isdecimal()]
    step, steps = last.get("step", 0), config["steps"]
    done = step >= steps and (path / "summary.json").exists()
    changed = max(p.stat().st_mtime for name in ("config.json", "metrics.jsonl") if (p := path / name).exists())
    return Standing(
        run=str(path.relative_to(root)) if path != root else path.name,
        algorithm=config["algorithm"],
        task=config["task"],
        step=step,
        steps=steps,
        reward=last.get("reward/mean"),
        accuracy=accuracies[-1] if accuracies else None,
        checkpoint=max(saved, default=0),
        state="running" if files.is_claimed(path) else "finished" if done else "interrupted",
        age=max(0.0, time.time() - changed),
    )


def table(runs: list[Standing]) -> str:
    """A line for every run."""
    head = ("run", "algorithm", "task", "step", "reward", "accuracy", "checkpoint", "state", "age")
    rows = []
    for r in runs:
        numbers = f"{r.step}/{r.steps}", _number(r.reward), _number(r.accuracy), str(r.checkpoint or "-")
        rows.append((r.run, r.algorithm, r.task, *numbers, r.state, _ago(r.age)))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)


def _found(root: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(root):
        if "config.json" in names and _is_run(Path(place)):
            folders.clear()
            yield Path(place)


def _is_run(path: Path) -> bool:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return bool({"algorithm", "task", "steps"} <= files.written(path)["config"].keys())
    return False


def _last_line(path: Path) -> dict[str, Any]:
    """Of the whole ones."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        for line in reversed(file.read().split(b"\n")[:-1]):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    return {}


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.3f}"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"
