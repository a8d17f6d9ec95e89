"""One run in several processes: each holds some of the devices, and all run the same program."""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxrl_llm import sharding
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Prompts, PyTree

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def start(*, heartbeat: int = 60) -> None:
    """Joins the other processes of the run, once; nothing may have touched a device before.

    TPU slices, Slurm, Kubernetes and Open MPI are recognised by JAX. Elsewhere the environment says what is to be
    known: `JAX_COORDINATOR_ADDRESS` (host:port of the first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`.

    Args:
      heartbeat: seconds without a sign of life after which a process counts as dead. The others end then, with a
          message and an exit status that is not 0; a run goes on from its last checkpoint (`jaxrl-llm resume`).

    Raises:
      ValueError: variables that are missing or no numbers, or nothing that says where the others are.
    """
    if jax.distributed.is_initialized():
        return
    address, *numbers = (os.environ.get(name) for name in VARIABLES)
    known: dict[str, Any] = {}
    if any(number is not None for number in numbers):
        if address is None or not all(number is not None and number.isdecimal() for number in numbers):
            said = ", ".join(f"{name}={os.environ.get(name)}" for name in VARIABLES)
            raise ValueError(f"several processes need all of {', '.join(VARIABLES)}, the last two numbers; got {said}")
        count, index = map(int, filter(None, numbers))
        if index >= count:
            raise ValueError(f"JAX_PROCESS_ID counts from 0 and must be below JAX_NUM_PROCESSES={count}, got {index}")
        known = {"coordinator_address": address, "num_processes": count, "process_id": index}
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": heartbeat}
    try:
        jax.distributed.initialize(**known, **limits)
    except ValueError as error:
        hint = f"set {', '.join(VARIABLES)}, or start the processes by a scheduler that JAX knows"
        raise ValueError(f"no other processes were found ({error}): {hint}") from error


def meet(mesh: Mesh) -> None:
    """Lets the devices of every group that the mesh makes exchange a number, while all processes are at this line.

    On CPUs the processes of a group must find each other within 30 seconds of its first use, which in a training step
    would depend on how long each of them compiles.
    """
    names = [name for name, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(len(names)) for group in itertools.combinations(names, n + 1)]

    def exchange() -> jax.Array:
        return sum((jax.lax.psum(jnp.ones(()), group) for group in groups), jnp.zeros(()))

    if jax.process_count() > 1:
        everywhere = jax.shard_map(exchange, mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False)
        jax.block_until_ready(jax.jit(everywhere)())


def batches(mesh: Mesh, task: Task, seed: int, n: int, start: int = 0) -> Iterator[Prompts]:
    """`task.batches`, each process reading only the rows that its devices hold.

    Args:
      mesh: the run's.
      task: with host data. If its `batches` has no argument `part`, every process reads all rows.
      seed, n, start: as in `Task.batches`; the rows of a batch are the same for any number of processes.

    Returns:
      prompts whose arrays span all processes.
    """
    assert task.batches is not None
    mine = _part(mesh, n)
    whole = "part" not in inspect.signature(task.batches).parameters
    options = {} if whole else {"part": mine}
    for batch in task.batches(seed, n, start=start, **options):
        here = jax.tree.map(np.asarray, batch)
        if whole:
            here = jax.tree.map(lambda x: x[mine], here)
        yield jax.tree.map(functools.partial(_spanning, mesh, n, mine), here)


def _part(mesh: Mesh, n: int) -> slice:
    """The smallest slice of `n` rows with all those that this process's devices hold."""
    where = sharding.of_rows(mesh, jax.ShapeDtypeStruct((n,), jnp.int32))
    held = [index[0].indices(n) for index in where.addressable_devices_indices_map((n,)).values()]
    return slice(min(first for first, _, _ in held), max(end for _, end, _ in held))


def _spanning(mesh: Mesh, n: int, mine: slice, x: np.ndarray) -> jax.Array:
    """The array of all processes' rows; `x` are this one's."""
    like = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)

    def rows(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(n)
        return x[first - mine.start : end - mine.start]

    return jax.make_array_from_callback(like.shape, sharding.of_rows(mesh, like), rows)


def on_host(tree: PyTree) -> PyTree:
    """All arrays, whole, as numpy, in the first process; None in the others, which must call this too."""
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)

    def whole(x: Any) -> np.ndarray | None:  # one after the other: the others hold one at a time
        found = np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return found if jax.process_index() == 0 else None

    found = jax.tree.map(whole, tree)
    return found if jax.process_index() == 0 else None
