"""Whole training states on disk, by orbax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.types import TrainState


def save(path: str | Path, state: TrainState) -> None:
    """Writes `state` to the folder `path`, replacing what was there; a half-written folder is never left under it."""
    ocp.save(Path(path).absolute(), _plain(state), overwrite=True)


def load(path: str | Path, like: TrainState) -> TrainState:
    """Reads a state.

    Args:
      path: what `save` was given.
      like: a state (or its `jax.eval_shape`) of the same learner: structure, dtypes and shardings.

    Raises:
      FileNotFoundError: there is no checkpoint at `path`.
      ValueError: the checkpoint's structure is not that of `like`.
    """
    path = Path(path).absolute()
    if not ocp.is_orbax_checkpoint(path):
        raise FileNotFoundError(f"no checkpoint at {path}")
    names = _plain(like)
    found = ocp.load(path, names)
    state: TrainState = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in names])
    return state


def _plain(state: Any) -> dict[str, Any]:
    """Leaves by their path: what a file can hold of a tree of dataclasses, and a reader can still name."""
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
