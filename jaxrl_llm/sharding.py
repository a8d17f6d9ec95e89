"""Where arrays live. The only file that names a device.

A step's prompts are split over the mesh axis `data`; parameters, optimiser and memory are whole on every device.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.types import PyTree


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh with one axis `data` over the first `devices` devices (all if None).

    Raises:
      ValueError: there are not that many devices.
    """
    found = jax.devices()
    n = len(found) if devices is None else devices
    if n > len(found):
        raise ValueError(f"asked for {n} devices, JAX sees {len(found)}")
    return jax.make_mesh((n,), ("data",), devices=found[:n], axis_types=(jax.sharding.AxisType.Auto,))


def over_data(mesh: Mesh | None, tree: Any) -> Any:
    """Inside a program: every array's leading axis is split over `data`. Without a mesh, nothing is said."""
    return _constrained(mesh, tree, PartitionSpec("data"))


def on_all(mesh: Mesh | None, tree: Any) -> Any:
    """Inside a program: every array is whole on every device. Without a mesh, nothing is said."""
    return _constrained(mesh, tree, PartitionSpec())


def place(mesh: Mesh, tree: PyTree) -> PyTree:
    """Outside a program: the leading axis of every array split over `data`."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Outside a program: every array whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _constrained(mesh: Mesh | None, tree: Any, spec: PartitionSpec) -> Any:
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))
