"""Whole training states on disk, by orbax: one at a time, or a run's series of them, written in the background."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.types import TrainState

DIGESTS = "digests.json"  # sha256 of every other file, written last


class SaveError(OSError):
    """A checkpoint could not be written; those before it are as they were."""


class CheckpointError(ValueError):
    """No checkpoint can be used: all are damaged, or they are another run's."""


class Saved(NamedTuple):
    """A checkpoint that was read: the state, and what the run wrote beside it (plain JSON)."""

    step: int
    state: TrainState
    run: dict[str, Any]


def save(path: str | Path, state: TrainState) -> None:
    """Writes `state` to the folder `path`, replacing what was there; a half-written folder is never left under it.

    Arrays may be sharded over devices and processes: each process writes its shards, and all of them must call this.
    """
    ocp.save(Path(path).absolute(), _plain(state), overwrite=True)


def load(path: str | Path, like: TrainState) -> TrainState:
    """Reads a state.

    Args:
      path: what `save` was given, or one folder of a series.
      like: a state (or its `jax.eval_shape`) of the same learner: structure, dtypes and shardings. The shardings need
        not be those the state was saved with; a leaf that names none goes to the first device.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`.
      ValueError: the checkpoint's structure is not that of `like`, or a file is not as it was written.
    """
    path = Path(path).absolute()
    if not ocp.is_orbax_checkpoint(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    if damage := damaged(path):
        raise ValueError(f"the checkpoint at {path} is damaged: {damage}")
    leaves = {jax.tree_util.keystr(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(like)}
    found = ocp.load(path, {name: _abstract(leaf) for name, leaf in leaves.items() if leaf.size})
    whole = [found[name] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()]
    state: TrainState = jax.tree.unflatten(jax.tree.structure(like), whole)
    return state


class Checkpoints:
    """The checkpoints of a run: a folder each, named by its step, under one that holds nothing else.

    A save returns as soon as the arrays are safe from the next step (on their way to the host, or held), and is written
    by a thread. A checkpoint appears under its name when it is whole, by a rename; digests of its files follow.

    Args:
      folder: made when first needed.
      keep: how many of the newest are kept.
      best: how many with the highest score are kept besides.
      say: told of checkpoints that were passed over.
    """

    def __init__(
        self, folder: str | Path, *, keep: int = 2, best: int = 1, say: Callable[[str], Any] = lambda _: None
    ) -> None:
        self.folder = Path(folder).absolute()
        self._keep, self._best, self._say = keep, best, say
        self._series: Any = None
        self._writing: threading.Thread | None = None
        self._error: SaveError | None = None
        self._last: int | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            self.wait()
        except SaveError:
            if kind is None:
                raise
        finally:
            self._close()

    def steps(self) -> list[int]:
        """The complete ones, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir())

    def save(self, step: int, state: TrainState, run: dict[str, Any], score: float | None = None) -> None:
        """Begins to write a checkpoint, once the one before it is done.

        Args:
          step: its name. One that this object has just written or read is left as it is.
          state: of every process; it may be donated as soon as this returns.
          run: plain JSON to keep beside it.
          score: what the best are chosen by; None: never the best.

        Raises:
          SaveError: this one cannot be begun, or the one before could not be finished.
        """
        self.wait()
        if step == self._last:
            return
        metrics = None if score is None else {"score": score}
        try:
            answer = self._open().save_async(
                step, _plain(state), force=True, overwrite=step in self.steps(), metrics=metrics, custom_metadata=run
            )
        except Exception as error:  # by disk, permission or library: all of them are a checkpoint less
            raise self._failed(step, error) from error
        self._writing = threading.Thread(target=self._finish, args=(step, answer), name="checkpoint")
        self._writing.start()

    def check(self) -> None:
        """Raises the SaveError of a save that failed since; does not wait."""
        if self._writing is not None and not self._writing.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written; raises SaveError if it failed."""
        if self._writing is not None:
            self._writing.join()
        self._writing, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def restore(self, like: TrainState, before: int | None = None) -> Saved | None:
        """The newest checkpoint that is as it was written; damaged ones are passed over, saying so.

        Args:
          like: as in `load`.
          before: only those of earlier steps.

        Returns:
          None if there is none.

        Raises:
          CheckpointError: an undamaged checkpoint does not fit `like`, or all are damaged.
        """
        self.wait()
        wrong = {}
        for step in (s for s in reversed(self.steps()) if before is None or s < before):
            path = self.folder / str(step)
            try:
                state = load(path, like)
                run = ocp.metadata(path).custom_metadata
                self._last = step
                return Saved(step, state, run or {})
            except Exception as error:
                if (path / DIGESTS).exists() and not damaged(path):  # nothing is wrong with the files
                    raise CheckpointError(f"the checkpoint at {path} is not of this configuration: {error}") from error
                wrong[step] = damaged(path) or str(error).splitlines()[0]
                self._say(f"checkpoint {step} is damaged ({wrong[step]}); trying the one before")
        if wrong:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged: {wrong}")
        return None

    def forget(self, after: int) -> None:
        """Deletes the checkpoints of later steps, the newest first."""
        self.wait()
        self._close()
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                if step > after:
                    shutil.rmtree(self.folder / str(step))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"forgot the checkpoints after {after}")

    def _open(self) -> Any:
        if self._series is None:
            policies = ocp.training.preservation_policies
            kept = [policies.LatestN(self._keep)]
            if self._best:
                score = operator.itemgetter("score")
                kept.append(policies.BestN(get_metric_fn=score, n=self._best, keep_checkpoints_without_metrics=False))
            self._series = ocp.training.Checkpointer(
                self.folder, preservation_policy=policies.AnyPreservationPolicy(kept), cleanup_tmp_directories=True
            )
        return self._series

    def _close(self) -> None:
        series, self._series = self._series, None
        if series is not None:
            series.close()

    def _finish(self, step: int, answer: Any) -> None:
        try:
            answer.result()
            if jax.process_index() == 0:
                _seal(self.folder / str(step))
            self._last = step
        except Exception as error:
            self._error = self._failed(step, error)

    def _failed(self, step: int, error: Exception) -> SaveError:
        """What a save left is removed, so that a full disk has room for the next one."""
        series, self._series = self._series, None
        try:
            if series is not None:
                series.close()
        except Exception:  # it raises once more what is being reported
            pass
        for path in self.folder.glob(f"{step}.*") if self.folder.is_dir() else ():
            shutil.rmtree(path, ignore_errors=True)
        reason = " ".join(str(error).split())
        return SaveError(f"checkpoint {step} could not be written to {self.folder}: {reason[:500]}")


def damaged(path: str | Path) -> str:
    """Which file of a checkpoint is not as it was written; "" if none is, or if the checkpoint has no digests."""
    path = Path(path)
    try:
        digests = json.loads((path / DIGESTS).read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        return f"{DIGESTS} cannot be read"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} has changed"
    return ""


def _seal(path: Path) -> None:
    """Digests of all files: array data have none of their own, a flipped bit would become a wrong number."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digests = {str(file.relative_to(path)): _digest(file, flush=True) for file in files}
    part = path / f"{DIGESTS}.part"
    with part.open("w") as file:
        json.dump(digests, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path / DIGESTS)


def _digest(path: Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(state: Any) -> dict[str, Any]:
    """Leaves by their path: what a file can hold of a tree of dataclasses, and a reader can still name.

    Arrays without elements, which orbax refuses, are left out: there is nothing to remember.
    """
    found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
    return {name: leaf for name, leaf in found.items() if leaf.size}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
