"""Which tensor of a Hugging Face folder each parameter is; safetensors files, read and written piece by piece."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import Sharding

from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.types import PyTree

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # from narrow to wide
# In a model that sees images: the text model's names, and the rest.
INSIDE, BESIDE = "language_model.", ("vision_tower.", "multi_modal_projector.")
UNUSED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # old files store constants
Shardings = Mapping[str, Sharding] | Callable[[str, tuple[int, ...]], Sharding]


@dataclasses.dataclass(frozen=True)
class Stored:
    """How a parameter lies in a folder: one tensor for each place of its leading axes (layers, experts).

    path: of the parameter, as "layers/q_proj/kernel".
    name: of a tensor, with a `{}` for each leading axis.
    shape: of a tensor in the file.
    lead: the leading axes.
    transposed: whether the file has outputs first.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    lead: tuple[int, ...] = ()
    transposed: bool = False

    @property
    def whole(self) -> tuple[int, ...]:
        """The parameter's shape."""
        return (*self.lead, *(self.shape[::-1] if self.transposed else self.shape))

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        for place in np.ndindex(*self.lead):
            yield place, self.name.format(*place)


def stored(config: TransformerConfig) -> list[Stored]:
    """Every parameter of `transformer(config)`."""
    c = config
    found = [
        Stored("embed", "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),
        Stored("norm/scale", "model.norm.weight", (c.hidden_size,)),
    ]
    if not c.tie_word_embeddings:
        found.append(Stored("lm_head", "lm_head.weight", (c.vocab_size, c.hidden_size), transposed=True))
    return [*found, *_attention(c), *_feed_forward(c), *_norms(c)]


def _kernel(c: TransformerConfig, path: str, name: str, out: int, inner: int) -> Stored:
    return Stored(f"layers/{path}", f"model.layers.{{}}.{name}.weight", (out, inner), (c.num_hidden_layers,), True)


def _attention(c: TransformerConfig) -> Iterator[Stored]:
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, out in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
        yield _kernel(c, f"{name}/kernel", f"self_attn.{name}", out, c.hidden_size)
        if c.qkv_bias:
            bias = f"model.layers.{{}}.self_attn.{name}.bias"
            yield Stored(f"layers/{name}/bias", bias, (out,), (c.num_hidden_layers,))
    yield _kernel(c, "o_proj/kernel", "self_attn.o_proj", c.hidden_size, wide)


def _feed_forward(c: TransformerConfig) -> Iterator[Stored]:
    if not c.num_experts:
        yield _kernel(c, "gate_proj/kernel", "mlp.gate_proj", c.intermediate_size, c.hidden_size)
        yield _kernel(c, "up_proj/kernel", "mlp.up_proj", c.intermediate_size, c.hidden_size)
        yield _kernel(c, "down_proj/kernel", "mlp.down_proj", c.hidden_size, c.intermediate_size)
        return
    yield _kernel(c, "router/kernel", "mlp.gate", c.num_experts, c.hidden_size)
    lead, wide = (c.num_hidden_layers, c.num_experts), (c.moe_intermediate_size, c.hidden_size)
    for name, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", wide[::-1])):
        file = f"model.layers.{{}}.mlp.experts.{{}}.{name}.weight"
        yield Stored(f"layers/experts/{name}", file, shape, lead, transposed=True)


def _norms(c: TransformerConfig) -> Iterator[Stored]:
    names = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if c.sandwich_norms:
        names["post_attention_norm"] = "post_attention_layernorm"
        names |= {"mlp_norm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    sizes = dict.fromkeys(names, c.hidden_size)
    if c.qk_norm:
        names |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        sizes |= {"q_norm": c.head_dim, "k_norm": c.head_dim}
    for ours, name in names.items():
        file = f"model.layers.{{}}.{name}.weight"
        yield Stored(f"layers/{ours}/scale", file, (sizes[ours],), (c.num_hidden_layers,))


# --- reading ----------------------------------------------------------------------------------------------------------


class Folder:
    """The tensors of a folder: `model.safetensors`, or the shards its index names. Files are opened once, mapped.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is missing.
      ValueError: a corrupt file or index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[Path, Any] = {}
        found = {name: path for name, path in self._find().items() if not name.startswith(BESIDE)}
        self._names = {name.removeprefix(INSIDE): name for name in found}  # ours to the file's
        self.where = {name: found[real] for name, real in self._names.items()}

    def _find(self) -> dict[str, Path]:
        if (whole := self.path / WEIGHTS).is_file():
            return dict.fromkeys(self._open(whole).keys(), whole)
        if not (index := self.path / INDEX).is_file():
            raise FileNotFoundError(f"{self.path}: neither {WEIGHTS} nor {INDEX}; other weight formats are not read")
        try:
            return {name: self.path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a JSON object with a 'weight_map' of tensor names to files") from error

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safetensors.safe_open(str(path), framework="np")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{path}: no such file, but {INDEX} names it") from error
            except (safetensors.SafetensorError, OSError) as error:
                hint = "was its copying cut off?"
                raise ValueError(f"{path}: not a whole safetensors file ({error}); {hint}") from error
        return self._files[path]

    def _slice(self, name: str) -> Any:
        path = self.where[name]
        try:
            return self._open(path).get_slice(self._names[name])
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot read tensor {name!r}: {error}") from error

    def check(self, parameters: Iterable[Stored], ignore: Collection[str] = ()) -> str:
        """Looks at every tensor's name, shape and type before any is read.

        Returns:
          the widest type of a tensor, as "bfloat16".

        Raises:
          ValueError: a tensor is missing, has another shape or type, or belongs to no parameter.
        """
        found: set[str] = set()
        left = set(self.where)
        for parameter in parameters:
            for _, name in parameter.names():
                found.add(self._checked(name, parameter.shape))
                left.discard(name)
        left = {name for name in left if not name.endswith(UNUSED) and name not in ("lm_head.weight", *ignore)}
        if left:
            name = min(left)
            raise ValueError(
                f"{self.where[name]}: tensor {name!r} belongs to nothing that {CONFIG} describes ({len(left)} such); "
                f"if the model computes without it, load with ignore=({name!r},)"
            )
        return DTYPES[max(found, key=list(DTYPES).index)]

    def _checked(self, name: str, shape: tuple[int, ...]) -> str:
        if name not in self.where:
            raise ValueError(f"{self.path}: no tensor {name!r}; {CONFIG} says the model has one")
        tensor = self._slice(name)
        if (has := tuple(tensor.get_shape())) != shape:
            raise ValueError(f"{self.where[name]}: tensor {name!r} has shape {has}, but {CONFIG} asks for {shape}")
        if (kind := tensor.get_dtype()) not in DTYPES:
            raise ValueError(
                f"{self.where[name]}: tensor {name!r} has type {kind}; only {', '.join(DTYPES)} are read (no quantised "
                "weights)"
            )
        return str(kind)

    def read(self, parameter: Stored, index: tuple[slice, ...]) -> np.ndarray:
        """The slice of a parameter, float32; nothing else of it is read."""
        starts, stops = zip(*(x.indices(n)[:2] for x, n in zip(index, parameter.whole, strict=True)), strict=True)
        n = len(parameter.lead)
        inner = tuple(map(slice, starts[n:], stops[n:]))
        out = np.empty([stop - start for start, stop in zip(starts, stops, strict=True)], np.float32)
        for place in np.ndindex(*out.shape[:n]):
            name = parameter.name.format(*(i + start for i, start in zip(place, starts, strict=False)))
            try:
                piece = self._slice(name)[inner[::-1] if parameter.transposed else inner]
            except (safetensors.SafetensorError, TypeError, ValueError, OSError) as error:
                raise ValueError(f"{self.where[name]}: cannot read tensor {name!r}: {error}") from error
            out[place] = piece.T if parameter.transposed else piece
        return out


def assemble(folder: Folder, parameters: Iterable[Stored], sharding: Shardings | None) -> PyTree:
    """Nested dict of parameters: numpy arrays, or JAX arrays made where they are to live, slice by slice."""
    tree: PyTree = {}
    parameters = list(parameters)
    if isinstance(sharding, Mapping):
        _same_paths(sharding, parameters)
    for parameter in parameters:
        *parents, leaf = parameter.path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = _placed(folder, parameter, sharding)
    return tree


def _same_paths(sharding: Mapping[str, Sharding], parameters: list[Stored]) -> None:
    paths = {parameter.path for parameter in parameters}
    if missing := sorted(paths - sharding.keys()):
        raise ValueError(f"sharding has no {missing[0]!r}; it must name every parameter")
    if unknown := sorted(sharding.keys() - paths):
        raise ValueError(f"sharding names {unknown[0]!r}, which this model does not have")


def _placed(folder: Folder, parameter: Stored, sharding: Shardings | None) -> Any:
    shape = parameter.whole
    if sharding is None:
        return folder.read(parameter, (slice(None),) * len(shape))
    where = sharding[parameter.path] if isinstance(sharding, Mapping) else sharding(parameter.path, shape)
    alike: dict[Any, list[Any]] = {}  # devices that hold the same slice share one reading of it
    for device, index in where.addressable_devices_indices_map(shape).items():
        index = (slice(None),) * len(shape) if index is None else index
        alike.setdefault(tuple((x.start, x.stop) for x in index), []).append((device, index))
    pieces = []
    for devices in alike.values():
        piece = folder.read(parameter, devices[0][1])
        # Waited for, so that the host holds one slice at a time and not a whole parameter, which may be many gigabytes.
        pieces += jax.block_until_ready([jax.device_put(piece, device) for device, _ in devices])
    return jax.make_array_from_single_device_arrays(shape, where, pieces, dtype=np.dtype(np.float32))


# --- writing ----------------------------------------------------------------------------------------------------------


def write(folder: Path, parameters: list[Stored], params: PyTree, *, dtype: Any, limit: int, tag: str = "") -> bool:
    """Writes the tensors in files of at most `limit` bytes (or one tensor); more than one get an index.

    Only one file's tensors are in host memory at a time.

    Args:
      tag: what tells the names of these shards from others in the folder they will be moved to.

    Returns:
      whether there is an index.
    """
    leaves = {parameter.path: _leaf(params, parameter) for parameter in parameters}
    files: list[list[tuple[Stored, tuple[int, ...], str]]] = [[]]
    room = limit
    for parameter in parameters:
        size = math.prod(parameter.shape) * np.dtype(dtype).itemsize
        for place, name in parameter.names():
            if size > room and files[-1]:
                files, room = [*files, []], limit
            files[-1].append((parameter, place, name))
            room -= size
    names = (
        [WEIGHTS]
        if len(files) == 1
        else [f"model-{i + 1:05}-of-{len(files):05}{tag}.safetensors" for i in range(len(files))]
    )
    for name, content in zip(names, files, strict=True):
        tensors = {tensor: _host(leaves[p.path], p, place, dtype) for p, place, tensor in content}
        safetensors.numpy.save_file(tensors, str(folder / name), metadata={"format": "pt"})
    if len(files) == 1:
        return False
    where = {tensor: name for name, content in zip(names, files, strict=True) for _, _, tensor in content}
    total = sum(math.prod(p.whole) for p in parameters)
    index = {
        "metadata": {"total_parameters": total, "total_size": total * np.dtype(dtype).itemsize},
        "weight_map": where,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return True


def _leaf(params: PyTree, parameter: Stored) -> Any:
    leaf = params
    for name in parameter.path.split("/"):
        if name not in leaf:
            raise ValueError(f"params has no {parameter.path!r}, which the configuration asks for")
        leaf = leaf[name]
    if leaf.shape != parameter.whole:
        raise ValueError(
            f"params[{parameter.path!r}] has shape {leaf.shape}, but the configuration asks for {parameter.whole}"
        )
    if not getattr(leaf, "is_fully_addressable", True):
        raise ValueError(
            f"params[{parameter.path!r}] lies on devices of several processes: gather it before saving, for "
            "instance with jax.experimental.multihost_utils.process_allgather"
        )
    return leaf


def _host(leaf: Any, parameter: Stored, place: tuple[int, ...], dtype: Any) -> np.ndarray:
    tensor = np.asarray(leaf[place] if place else leaf).astype(dtype, copy=False)
    return np.ascontiguousarray(tensor.T if parameter.transposed else tensor)
