"""The folder of a run: its files, who may write to them, and how they survive what happens to the process.

=================  =====================================================================================
`config.json`      the configuration, the recipe as an expression, the model, the data, versions, devices
`metrics.jsonl`    a line for every step
`events.jsonl`     what happened when: starts, checkpoints, evaluations, faults; only ever appended to
`checkpoints/`     whole training states, a folder each, named by step
`lock`             held by the process that trains
`summary.json`     accuracy and reward before and after; written last, with `transcripts.json`, `policy/`, `curve.png`
`adapters/`        of a run with adapters: them alone, for PEFT; `policy/` has them merged
=================  =====================================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
import typing
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax

PACKAGES = ("jaxrl_llm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")
C = TypeVar("C")


class FolderError(ValueError):
    """The files of a run do not fit together."""


class Lines:
    """`metrics.jsonl`: line `i` is of step `i`, and no line is lost, torn or written twice.

    What cannot be written (a full disk) is kept, and written with the next line.

    Args:
      path: the file; None writes nothing (all but one process of a run).
      keep: lines of an earlier process that stand; what follows them is cut off.

    Raises:
      FolderError: the file does not begin with whole lines of steps 1 to `keep`.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self._path, self._pending, self._file = path, b"", -1
        if path is not None:
            self._size = _end_of(path, keep)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, self._size)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._file >= 0:
            os.close(self._file)

    def add(self, line: dict[str, Any]) -> None:
        """In the file after `flush`."""
        if self._file >= 0:
            self._pending += (json.dumps(line, allow_nan=False) + "\n").encode()

    def flush(self, disk: bool = False) -> None:
        """Hands all lines to the system, and with `disk` to the disk.

        Raises:
          OSError: that failed; the file ends where it did before, and the lines are still here.
        """
        if self._file < 0:
            return
        try:
            done = 0
            while done < len(self._pending):
                done += os.pwrite(self._file, self._pending[done:], self._size + done)
            if disk:
                os.fsync(self._file)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size, self._pending = self._size + done, b""

    def cut(self, keep: int) -> None:
        """Goes back to the first `keep` lines."""
        if self._path is not None:
            self._size, self._pending = _end_of(self._path, keep), b""
            os.ftruncate(self._file, self._size)


def _end_of(path: Path, lines: int) -> int:
    """Bytes of the first `lines` lines."""
    end = 0
    if lines == 0:
        return end
    with path.open("rb") as file:
        for step in range(1, lines + 1):
            line = file.readline()
            try:
                found = json.loads(line)["step"] if line.endswith(b"\n") else None
            except (ValueError, TypeError, KeyError):
                found = None
            if found != step:
                raise FolderError(
                    f"{path} line {step}: expected the line of step {step}, found {line[:60]!r}; the checkpoint is of "
                    f"step {lines}, so put back the file as it was, or start a new run"
                )
            end += len(line)
    return end


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder and holds its lock, which ends with the process, however that ends.

    Raises:
      BlockingIOError: another process is training into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: {_holder(folder)} is training into it") from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def is_claimed(folder: Path) -> bool:
    """Whether a process is training into it."""
    try:
        with (folder / "lock").open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        return (folder / "lock").read_text() or "another process"
    return "another process"


def event(folder: Path, what: str, **values: Any) -> None:
    """A line in `events.jsonl`. That it cannot be written stops nothing."""
    line = {"time": round(time.time(), 3), "event": what, **values}
    with contextlib.suppress(OSError), (folder / "events.jsonl").open("ab") as file:
        file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def events(folder: Path) -> list[dict[str, Any]]:
    """What happened so far; torn lines are left out."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "events.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON; paths are absolute, so that a run can be resumed from any folder."""
    found = dataclasses.asdict(config)
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in found.items()}


def configured(kind: type[C], folder: Path) -> C:
    """The configuration in `config.json` as a `kind`, with `run` the folder it is in.

    Raises:
      FileNotFoundError: there is no run in the folder.
      ValueError: the file cannot be read, or names a field this version does not have.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no run in {folder}: it has no config.json")
    try:
        found = dict(json.loads(path.read_text())["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a run's configuration: {error!r}") from error
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(found) - set(hints)):
        raise ValueError(f"{path}: this version of jaxrl_llm has no option {unknown[0]!r}")
    values = {
        name: Path(x) if isinstance(x, str) and Path in (hints[name], *typing.get_args(hints[name])) else x
        for name, x in found.items()
    }
    return kind(**{**values, "run": folder})


def written(folder: Path) -> dict[str, Any]:
    """All of `config.json`."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def clear(folder: Path) -> None:
    """Removes what an earlier run left."""
    for name in ("summary.json", "transcripts.json", "curve.png", "metrics.jsonl", "events.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "policy", "adapters"):
        shutil.rmtree(folder / name, ignore_errors=True)


def surroundings() -> dict[str, Any]:
    """What decides a run besides its configuration."""
    return {
        "versions": {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "devices": [str(device) for device in jax.devices()],
    }


def digest(data: Path | None) -> str | None:
    """sha256 over the files of a data set: of one file, or of those directly in a folder."""
    if data is None:
        return None
    total = hashlib.sha256()
    files = sorted(path for path in data.iterdir() if path.is_file()) if data.is_dir() else [data]
    for path in files:
        with path.open("rb") as file:
            total.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`name: old -> new` for everything that differs."""
    found = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += changed(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name}: {a} -> {b}")
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a source tree
        return None
