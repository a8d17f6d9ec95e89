"""Where arrays live: a mesh, and one table from the path of an array to the mesh axes its dimensions are split over.

====================  =============================================================================================
`data`                prompts, their rollouts and the sampler's cache; weights are copied
`fsdp`                as `data`, and the weights too: gathered where they are used, gradients scattered back
`tensor`              heads, the inner width of the MLP and the vocabulary: each device computes its part of a layer
====================  =============================================================================================

A recipe, a model and a stage know nothing of it. What the table does not name is whole on every device. An axis whose
size does not divide a dimension is left out there: the array is then whole along that axis, which costs memory and
changes no result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.models.model import Model
from jaxrl_llm.types import PyTree

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what prompts, and all that is made of them, are split over
LARGE = 2**20  # bytes from which a stage's memory is worth splitting

Axis = str | tuple[str, ...] | None
Rule = tuple[Axis, ...] | Callable[[tuple[int, ...], int, Mapping[str, int]], tuple[Axis, ...]]


def longest(shape: tuple[int, ...], nbytes: int, mesh: Mapping[str, int]) -> tuple[Axis, ...]:
    """The longest dimension of a matrix that `fsdp` divides."""
    fits = [i for i, n in enumerate(shape) if n % mesh.get("fsdp", 1) == 0] if len(shape) > 1 else []
    chosen = max(fits, key=lambda i: shape[i], default=None)
    return tuple("fsdp" if i == chosen else None for i in range(len(shape)))


def leading(shape: tuple[int, ...], nbytes: int, mesh: Mapping[str, int]) -> tuple[Axis, ...]:
    """The first dimension (the rows of the data set, of a queue ...) of an array that is not small."""
    return (ROWS,) + (None,) * (len(shape) - 1) if shape and nbytes >= LARGE else ()


# The first line that is found in a path decides. Axes are those of the last dimensions: layers, experts, seeds and
# whatever else arrays are stacked along come before them and stay whole. Optimiser states, and memories that hold
# parameters, have paths that end like those of the parameters.
_KERNEL = r"/kernel(/array)?(/qvalue|/scale|/zero_point)?$"
TABLE: tuple[tuple[str, Rule], ...] = (
    (r"/embed$", ("tensor", "fsdp")),
    (r"/lm_head$", ("fsdp", "tensor")),
    (r"/(q|k|v|gate|up)_proj" + _KERNEL, ("fsdp", "tensor")),
    (r"/(o|down)_proj" + _KERNEL, ("tensor", "fsdp")),
    (r"/experts/(gate|up)_proj$", ("fsdp", "tensor")),
    (r"/experts/down_proj$", ("tensor", "fsdp")),
    (r"/router/kernel$", ("fsdp", None)),
    (r"/(q|k|v|gate|up)_proj/bias$", ("tensor",)),
    (r"/(q|k|v|gate|up)_proj/kernel_lora_a$", ("fsdp", None)),
    (r"/(q|k|v|gate|up)_proj/kernel_lora_b$", (None, "tensor")),
    (r"/(o|down)_proj/kernel_lora_a$", ("tensor", None)),
    (r"/(o|down)_proj/kernel_lora_b$", (None, "fsdp")),
    (r"(norm/scale|/bias)$", ()),
    (r"^(params|opt_state)/", longest),  # another model's
    (r"^memory/", leading),
)


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh `data x fsdp x tensor`, neighbours along `tensor`.

    Args:
      data, fsdp, tensor: devices along each axis; one of them may be -1: all that the others leave.
      devices: which, all there are if None. Those of a described topology serve to compile for it.

    Raises:
      ValueError: sizes that do not multiply to the number of devices.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    found = list(jax.devices() if devices is None else devices)
    rest = [name for name, n in sizes.items() if n == -1]
    known = math.prod(n for n in sizes.values() if n != -1)
    said = ",".join(f"{name}={n}" for name, n in sizes.items())
    if any(n < 1 and n != -1 for n in sizes.values()) or len(rest) > 1:
        raise ValueError(f"mesh sizes must be at least 1, and one of them may be -1 (the rest), got {said}")
    if len(found) % known or (not rest and known != len(found)):
        raise ValueError(f"a mesh of {said} needs {'a multiple of ' if rest else ''}{known} devices, got {len(found)}")
    sizes |= {name: len(found) // known for name in rest}
    return jax.make_mesh(tuple(sizes.values()), AXES, devices=found, axis_types=(AxisType.Auto,) * len(AXES))


def parse(text: str) -> dict[str, int]:
    """The arguments of `mesh` as a command line has them: `data=2,fsdp=-1`.

    Raises:
      ValueError: something else.
    """
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name.strip(): size.strip() for name, _, size in pairs}
    if len(sizes) < len(pairs) or set(sizes) - set(AXES) or not all(re.fullmatch(r"-1|\d+", n) for n in sizes.values()):
        raise ValueError(f"a mesh is written as data=2,fsdp=-1,tensor=4, each axis at most once, got {text!r}")
    return {name: int(size) for name, size in sizes.items()}


def check_split_tokens(text: str | None) -> None:
    """Raises ValueError if a mesh written so (None: one device, or `data` alone) has no axis to split tokens over."""
    if text is None or parse(text).get("tensor", 1) == 1:
        raise ValueError(f"--split-tokens splits them over tensor: --mesh tensor=N, got {text}")


def data_mesh(devices: int | None = None) -> Mesh:
    """A mesh over the first `devices` devices (all if None), all along `data`.

    Raises:
      ValueError: there are not that many devices.
    """
    found = jax.devices()
    n = len(found) if devices is None else devices
    if n > len(found):
        raise ValueError(f"asked for {n} devices, JAX sees {len(found)}")
    return mesh(data=n, devices=found[:n])


# --- the table --------------------------------------------------------------------------------------------------------


def spec(sizes: Mapping[str, int], path: str, shape: tuple[int, ...], nbytes: int = 0) -> PartitionSpec:
    """The table's answer for one array.

    Args:
      sizes: devices by axis, `mesh.shape`.
      path: the array's keys joined by "/", as `params/policy/layers/q_proj/kernel`.
      shape: its shape.
      nbytes: its size.
    """
    rule = next((rule for pattern, rule in TABLE if re.search(pattern, path)), ())
    axes = rule(shape, nbytes, sizes) if callable(rule) else rule
    missing = len(shape) - len(axes)
    return fitted(sizes, (None,) * missing + axes[max(-missing, 0) :], shape)


def fitted(sizes: Mapping[str, int], axes: tuple[Axis, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """`axes` of the first dimensions, without those of size 1 and those that do not divide (of several the last)."""
    kept: list[Axis] = []
    for axis, n in zip(axes, shape, strict=False):
        names = [name for name in ((axis,) if isinstance(axis, str) else axis or ()) if sizes.get(name, 1) > 1]
        while names and n % math.prod(sizes[name] for name in names):
            names.pop()
        kept.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    while kept and kept[-1] is None:
        kept.pop()
    return PartitionSpec(*kept)


def decoder_spec(sizes: Mapping[str, int], path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Of a weight while tokens are sampled: split over `tensor` alone."""
    return spec({**sizes, "fsdp": 1}, f"decoder/{path}", shape)


def cache_axes(x: Any) -> tuple[Axis, ...]:
    """Of a leaf of the sampler's cache: its rows, and its heads where it has an axis of them."""
    return (ROWS, "tensor") if x.ndim >= 4 else (ROWS,)


def of_state(mesh: Mesh, tree: PyTree, at: str = "") -> PyTree:
    """The sharding of every array of a `TrainState`, or of the part of one whose path begins with `at`.

    Args:
      mesh: where.
      tree: arrays or `jax.ShapeDtypeStruct`s.
      at: as `params/policy`, for that part alone.
    """

    def of(path: Any, x: Any) -> NamedSharding:
        name = "/".join(filter(None, [at, jax.tree_util.keystr(path, simple=True, separator="/")]))
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, spec(mesh.shape, name, x.shape, math.prod(x.shape) * x.dtype.itemsize))

    return jax.tree_util.tree_map_with_path(of, tree)


def rows_over(mesh: Mesh | None) -> int:
    """Over how many parts of the mesh a step's prompts are split."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in ROWS)


def shaped(mesh: Mesh, tree: T, at: str = "") -> T:
    """`jax.ShapeDtypeStruct`s of arrays that are where the table says: what a checkpoint is read into."""
    found: T = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree, of_state(mesh, tree, at)
    )
    return found


def of_weights(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """`(path, shape) -> sharding` of a policy's parameters: what reading them from files wants to know."""
    return lambda path, shape: NamedSharding(mesh, spec(mesh.shape, f"params/policy/{path}", shape))


def of_rows(mesh: Mesh, tree: PyTree) -> PyTree:
    """The sharding of arrays whose first dimension is a step's prompts."""
    return jax.tree.map(lambda x: NamedSharding(mesh, fitted(mesh.shape, (ROWS,), x.shape)), tree)


# --- inside a program -------------------------------------------------------------------------------------------------


def as_state(mesh: Mesh | None, tree: T, at: str = "") -> T:
    """Arrays of a state, or of its part `at`, where the table says. Without a mesh, nothing is said."""
    return tree if mesh is None else _constrained(tree, of_state(mesh, tree, at))


def over_data(mesh: Mesh | None, tree: T) -> T:
    """Every array's first dimension split over the devices that share a step's prompts."""
    return tree if mesh is None else _constrained(tree, of_rows(mesh, tree))


def on_all(mesh: Mesh | None, tree: T) -> T:
    """Every array whole on every device."""
    return tree if mesh is None else _constrained(tree, NamedSharding(mesh, PartitionSpec()))


def on_mesh(mesh: Mesh | None, function: Callable[..., T]) -> Callable[..., T]:
    """`function`, traced with `mesh` as what `split` means."""

    def traced(*args: Any, **options: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext():
            return function(*args, **options)

    return traced


def split(x: jax.Array, *axes: Axis) -> jax.Array:
    """`x` with its first dimensions split over `axes` of the mesh the program is traced for, if it is for one."""
    where = jax.sharding.get_abstract_mesh()
    if where.empty or not isinstance(x, jax.core.Tracer):
        return x
    return _constrained(x, fitted(where.shape, axes, x.shape))


def parts(axis: str) -> int:
    """Devices along an axis of the mesh the program is traced for; 1 without one."""
    return int(jax.sharding.get_abstract_mesh().shape.get(axis, 1))


def by_rows(mesh: Mesh | None, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """`function(*arrays)` of arrays `[B ...]` with a result `[B ...]`, called once for the rows of each device."""
    if mesh is None:
        return function(*arrays)
    rows = fitted(mesh.shape, (ROWS,), jax.tree.leaves(arrays)[0].shape)
    return jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(*arrays)


def _constrained(tree: T, where: Any) -> T:
    found: T = jax.lax.with_sharding_constraint(tree, where)
    return found


def placed(model: Model) -> Model:
    """The model, saying of its activations and caches where they are: split like prompts, heads and vocabulary."""

    def cache(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: split(x, *cache_axes(x)), tree)

    def logits(params: PyTree, hidden: jax.Array) -> jax.Array:
        out = model.logits(params, hidden)
        return split(out, ROWS, *(None,) * (out.ndim - 2), "tensor")

    def inner(*args: Any, **options: Any) -> jax.Array:
        assert model.inner is not None
        return split(model.inner(*args, **options), ROWS)

    def packed(*args: Any, **options: Any) -> jax.Array:
        assert model.packed is not None
        return split(model.packed(*args, **options), ROWS)

    def decode(*args: Any, **options: Any) -> tuple[jax.Array, PyTree]:
        hidden, kept = model.decode(*args, **options)
        return split(hidden, ROWS), cache(kept)

    return dataclasses.replace(
        model,
        hidden=lambda *args: split(model.hidden(*args), ROWS),
        inner=model.inner and inner,
        packed=model.packed and packed,
        logits=logits,
        prefill=lambda *args: cache(model.prefill(*args)),
        decoder=lambda params: gathered(model.decoder(params)),
        empty=lambda *args: cache(model.empty(*args)),
        decode=decode,
    )


def gathered(params: PyTree, *, but: str = "") -> PyTree:
    """Weights split over `tensor` alone: fetching them from `fsdp` for every token would cost more than the token.

    Args:
      params: weights.
      but: a part of the tree that stays as it is.
    """
    where = jax.sharding.get_abstract_mesh()

    def one(path: Any, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if (but and name.startswith(f"{but}/")) or not isinstance(x, jax.core.Tracer):
            return x
        return _constrained(x, decoder_spec(where.shape, name, x.shape))

    return params if where.empty else jax.tree_util.tree_map_with_path(one, params)


# --- outside a program ------------------------------------------------------------------------------------------------


def place(mesh: Mesh, tree: T) -> T:
    """The first dimension of every array split over the devices that share a step's prompts."""
    return _put(tree, of_rows(mesh, tree))


def place_state(mesh: Mesh, tree: T, at: str = "") -> T:
    """Arrays of a state, or of its part `at`, where the table says."""
    return _put(tree, of_state(mesh, tree, at))


def on_rows(mesh: Mesh | None, function: Callable[..., np.ndarray], arrays: tuple[Any, ...]) -> jax.Array:
    """`function(*arrays)` on the host, of arrays `[B ...]` with a result `[B G]` like the second of them.

    In several processes each calls it for the rows that its devices hold.
    """
    if mesh is None or mesh.devices.size == len(mesh.local_devices):
        return jnp.asarray(function(*jax.tree.map(np.asarray, arrays)))
    shape = arrays[1].shape[:2]

    @functools.cache
    def rows(first: int, end: int) -> np.ndarray:
        return function(*jax.tree.map(lambda x: _held(x, first, end), arrays))

    def at(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(shape[0])
        return rows(first, end)

    return jax.make_array_from_callback(shape, of_rows(mesh, jax.ShapeDtypeStruct(shape, jnp.float32)), at)


def _held(x: jax.Array, first: int, end: int) -> np.ndarray:
    """Rows of an array that this process holds."""
    for shard in x.addressable_shards:
        start, stop, _ = shard.index[0].indices(x.shape[0])
        if start <= first and end <= stop:
            return np.asarray(shard.data)[first - start : end - start]
    raise ValueError(f"rows {first} to {end} of {x.shape[0]} are not on the devices of this process: {x.sharding}")


def replicate(mesh: Mesh, tree: T) -> T:
    """Every array whole on every device."""
    return _put(tree, NamedSharding(mesh, PartitionSpec()))


def _put(tree: T, where: Any) -> T:
    found: T = jax.device_put(tree, where)
    return found
