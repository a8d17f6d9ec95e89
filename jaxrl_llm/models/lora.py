"""Low-rank adapters (LoRA, 2106.09685) on a frozen base, which may be quantised (QLoRA, 2305.14314), by qwix."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from jaxrl_llm.models.model import Adapter, Model
from jaxrl_llm.types import PyTree

Path = tuple[str, ...]

A, B = "kernel_lora_a", "kernel_lora_b"  # where qwix keeps the factors: beside the kernel they belong to
BITS = {"int8": 8, "int4": 4, "nf4": 4}
# As PEFT begins: uniform in +-1/sqrt(inputs), for each layer of the stack.
first_factor = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", batch_axis=(0,))


def lora(
    model: Model,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: Sequence[str] | None = None,
    quantize: str | None = None,
    block_size: int | None = None,
) -> Model:
    """The model with kernels `W + alpha / rank * A B`, of which only `A` and `B` are parameters to train.

    Its parameters are those of `model` with `A` `[layers, inputs, rank]` and `B` `[layers, rank, outputs]` beside each
    target's kernel. A new `B` is 0, so that the model is the base bit for bit. What `learner(policy=
    language_model(lora(model)), params=...)` trains, keeps an optimiser for, and copies for a reference is `A` and `B`.
    The base is `state.params["base"]`, once. It is a copy of what was given, which stays the caller's: give numpy
    arrays, as `hf.load` does, to have it on the device once. What a recipe does to weights (an average with the
    reference, a population) it does to `A` and `B`, which is not always the same.

    Args:
      model: made of Flax Linen modules (`transformer`).
      rank: of the adapters, less than either side of any target.
      alpha: the adapters' weight is `alpha / rank`.
      targets: names of linear layers, as `("q_proj", "v_proj")`; None: all of them. A router and its experts have none.
      quantize: how all these linear layers of the base are kept: "int8", "int4" (absmax), "nf4" (2305.14314), or None
        as they are. A kernel is dequantised, in the computation's dtype, where it is multiplied.
      block_size: inputs of a kernel's column that share a scale; None: 64 with 4 bits, all of them with 8.

    Raises:
      ImportError: qwix is not installed.
      ValueError: an argument that does not fit the model.
    """
    qwix = _qwix()
    if model.wrapped is None:
        raise ValueError("lora needs a model of Flax Linen modules (models.transformer), without adapters so far")
    layers = _linear(jax.eval_shape(model.init, jax.random.key(0)))
    chosen = _checked(layers, rank, alpha, targets)
    tile = _tile(layers, quantize, block_size)
    kept = {"weight_qtype": quantize, "tile_size": tile}
    rules = [qwix.LoraRule(module_path=_any_of(chosen), rank=rank, alpha=alpha, **kept)]
    if quantize is not None:
        rules.append(qwix.QuantizationRule(module_path=_any_of(layers), **kept))
    provider = _provider(rules)
    adapted = model.wrapped(wrap=lambda module: qwix.apply_lora_to_model(module, provider))
    like = flatten_dict(jax.eval_shape(adapted.init, jax.random.key(0)))
    adapter = Adapter(
        base=functools.partial(_base, like),
        own=functools.partial(_own, like),
        fresh=functools.partial(_fresh, like),
        join=_join,
        merge=functools.partial(_merge, alpha / rank),
    )

    def init(key: Array) -> PyTree:
        return _join(adapter.base(model.init(key)), adapter.fresh(jax.random.fold_in(key, 1)))

    def ready(function: Callable[..., Any] | None) -> Any:
        return None if function is None else functools.partial(_with_ready, function, model.dtype)

    changed = {name: ready(getattr(adapted, name)) for name in ("hidden", "inner", "packed", "prefill", "decoder")}
    return dataclasses.replace(adapted, init=init, adapter=adapter, **changed)


def _qwix() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError("LoRA and quantisation need qwix: pip install 'jaxrl_llm[lora]'") from error
    return qwix


def _provider(rules: list[Any]) -> Any:
    class Provider(_qwix().LoraProvider):  # type: ignore[misc]
        def dot_general(self, lhs: Array, rhs: Any, numbers: Any, *args: Any, **options: Any) -> Array:
            out: Array = super().dot_general(lhs, rhs, numbers, *args, **options)
            ours = self._get_current_rule_and_op_id("dot_general", only_rule=True)[0] is not None
            return out.astype(lhs.dtype) if ours else out  # factors in float32 would widen it

    return Provider(rules)


# --- arguments --------------------------------------------------------------------------------------------------------


def _linear(params: PyTree) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers that a block has."""
    kernels = {path: x for path, x in flatten_dict(params).items() if path[-1] == "kernel" and x.ndim == 3}
    return {path[-2]: x.shape[1:] for path, x in kernels.items() if path[-2].endswith("_proj")}


def _checked(layers: dict[str, tuple[int, int]], rank: int, alpha: float, targets: Sequence[str] | None) -> list[str]:
    chosen = sorted(layers if targets is None else targets)
    if isinstance(targets, str) or not chosen:
        raise ValueError(f"targets must be a list of names of layers, or None for all of them, got {targets!r}")
    if unknown := sorted(set(chosen) - set(layers)):
        raise ValueError(f"no target {unknown[0]!r}: the model's linear layers are {', '.join(sorted(layers))}")
    name = min(chosen, key=lambda name: min(layers[name]))
    if not 1 <= rank < min(layers[name]):
        raise ValueError(f"rank must be at least 1 and less than {min(layers[name])}, a side of {name}, got {rank}")
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be positive, got {alpha}: the adapters' weight is alpha / rank")
    return chosen


def _tile(layers: dict[str, tuple[int, int]], quantize: str | None, block_size: int | None) -> int | None:
    if quantize is None:
        if block_size is not None:
            raise ValueError(f"block_size={block_size} is of a quantised base: say quantize=, one of {', '.join(BITS)}")
        return None
    if quantize not in BITS:
        raise ValueError(f"quantize must be one of {', '.join(BITS)}, or None, got {quantize!r}")
    tile = block_size if block_size is not None or BITS[quantize] == 8 else 64
    for name, (inputs, _) in layers.items():
        if tile is not None and (tile < 1 or inputs % tile):
            raise ValueError(f"block_size {tile} must divide the inputs of every linear layer, and {name} has {inputs}")
    return tile


def _any_of(names: Any) -> str:
    return f"(.*/)?({'|'.join(sorted(names))})"


# --- parameters -------------------------------------------------------------------------------------------------------


def _is_adapter(path: Path) -> bool:
    return path[-1] in (A, B)


def _base(like: dict[Path, Any], params: PyTree) -> PyTree:
    given = {path: x for path, x in flatten_dict(params).items() if not _is_adapter(path)}
    # Leaf by leaf, so that a device never holds more than one kernel as it was.
    return unflatten_dict({path: _kept(like.get(path), x) for path, x in given.items()})


def _kept(like: Any, x: Any) -> Any:
    how = getattr(like, "how", None)
    if how is None or hasattr(x, "how"):
        return jax.tree.map(jnp.array, x)
    tiles = tuple(how.tiled_axes.items())
    array = _quantized(jnp.asarray(x), how.qtype, tuple(how.channelwise_axes), tiles, jnp.dtype(like.dtype))
    return like.replace(array=array)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantized(kernels: Array, qtype: str, channels: tuple[int, ...], tiles: tuple[Any, ...], dtype: Any) -> Any:
    """A stack of kernels `[layers, inputs, outputs]`, one after the other."""

    def one(kernel: Array) -> Any:
        found = _qwix().quantize(
            kernel.astype(jnp.float32), qtype, channelwise_axes=channels, tiled_axes=dict(tiles), scale_dtype=dtype
        )
        codes = found.qvalue
        if codes.dtype == jnp.uint4:  # which checkpoints do not know; see _ready
            codes = jax.lax.bitcast_convert_type(codes, jnp.int4)
        return found.replace(qvalue=codes)

    return jax.lax.map(one, kernels)


def _own(like: dict[Path, Any], params: PyTree) -> PyTree | None:
    """The adapters among the parameters, or None.

    Raises:
      ValueError: they are of another rank or for other targets.
    """
    found = {path: x for path, x in flatten_dict(params).items() if _is_adapter(path)}
    wanted = {path: x for path, x in like.items() if _is_adapter(path)}
    if not found:
        return None
    if different := sorted(found.keys() ^ wanted.keys()):
        has = "has adapters" if different[0] in found else "has no adapters"
        raise ValueError(f"params {has} for {'/'.join(different[0][:-1])}, unlike this model: check its targets")
    for path, x in found.items():
        if x.shape != wanted[path].shape:
            shapes = f"shape {x.shape}, this model's is {wanted[path].shape}"
            raise ValueError(f"params[{'/'.join(path)!r}] has {shapes}: check its rank")
    return unflatten_dict(found)


def _fresh(like: dict[Path, Any], key: Array) -> PyTree:
    paths = sorted(path for path in like if _is_adapter(path))
    keys = jax.random.split(key, len(paths))
    return unflatten_dict(
        {
            path: first_factor(k, like[path].shape, jnp.float32)
            if path[-1] == A
            else jnp.zeros(like[path].shape, jnp.float32)
            for path, k in zip(paths, keys, strict=True)
        }
    )


def _join(base: PyTree, adapters: PyTree) -> PyTree:
    return unflatten_dict({**flatten_dict(base), **flatten_dict(adapters)})


def _merge(scale: float, base: PyTree, adapters: PyTree) -> PyTree:
    factors = flatten_dict(adapters)

    def merged(path: Path, x: Any) -> Any:
        x = _dequantized(x) if hasattr(x, "how") else x
        at, bt = ((*path[:-1], name) for name in (A, B))
        if path[-1] != "kernel" or at not in factors:
            return x
        change = jnp.matmul(factors[at], factors[bt], precision=jax.lax.Precision.HIGHEST)
        return (x.astype(jnp.float32) + scale * change).astype(x.dtype)

    return unflatten_dict({path: merged(path, x) for path, x in flatten_dict(base).items()})


def _dequantized(kernels: Any) -> Array:
    found: Array = jax.lax.map(_qwix().dequantize, _ready(kernels).array)
    return found.astype(jnp.float32)


def _with_ready(function: Callable[..., Any], dtype: Any, params: PyTree, *args: Any, **options: Any) -> Any:
    flat = flatten_dict(params)
    params = {path: x.astype(dtype) if _is_adapter(path) else _ready(x) for path, x in flat.items()}
    return function(unflatten_dict(params), *args, **options)


def _ready(x: Any) -> Any:
    """With the codes that qwix knows."""
    if not hasattr(x, "how") or x.array.qtype != "nf4":
        return x
    codes = jax.lax.bitcast_convert_type(x.array.qvalue, jnp.uint4)
    return x.replace(array=x.array.replace(qvalue=codes))
