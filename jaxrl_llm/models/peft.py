"""Adapters as folders of Hugging Face's PEFT library: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxrl_llm.models.lora import A, B
from jaxrl_llm.types import PyTree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Where the modules of Hugging Face's decoders have the layers that ours have side by side.
PARENT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn"),
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
}
TENSOR = re.compile(
    r"base_model\.model\.model\.layers\.(?P<layer>\d+)\.(?P<parent>\w+)\.(?P<name>\w+)\.lora_(?P<factor>[AB])\.weight"
)
# What would change the computation, and the value it must have: {key: value, which is also that of an absent key}.
FIXED: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_rslora": False,
}


class Adapters(NamedTuple):
    """Adapters that were read: `lora(model, rank=rank, alpha=alpha, targets=targets)` is the model they fit."""

    params: PyTree
    rank: int
    alpha: float
    targets: tuple[str, ...]


def save(folder: str | os.PathLike[str], adapters: PyTree, *, alpha: float, base: str | None = None) -> None:
    """Writes adapters so that `peft.PeftModel.from_pretrained(model, folder)`, and `load`, read them.

    Each file appears whole or not at all, the configuration last.

    Args:
      folder: replaced file by file where it exists.
      adapters: as `state.params["policy"]` of a run with `lora`.
      alpha: that of `lora`.
      base: folder or name of the base model, for readers that fetch it.

    Raises:
      ValueError: adapters of layers that Hugging Face's decoders do not have.
    """
    tensors = dict(_tensors(jax.device_get(adapters)))
    ranks = {x.shape[0] for name, x in tensors.items() if ".lora_A." in name}
    if len(ranks) != 1:
        raise ValueError(f"adapters must have one rank, got {sorted(ranks) or 'none'}")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": ranks.pop(),
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted({path[-2] for path in flatten_dict(adapters)}),
        "inference_mode": True,
        "init_lora_weights": True,
        **FIXED,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as fresh:
        safetensors.numpy.save_file(tensors, str(Path(fresh) / WEIGHTS), metadata={"format": "pt"})
        (Path(fresh) / CONFIG).write_text(json.dumps(settings, indent=2) + "\n")
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(fresh) / name, folder / name)


def load(folder: str | os.PathLike[str]) -> Adapters:
    """Reads adapters that PEFT or `save` wrote.

    `learner(..., policy=language_model(model), params=model.adapter.join(base, found.params))` goes on from them.

    Raises:
      FileNotFoundError: a missing folder or file.
      ValueError: adapters that are not plain LoRA on linear layers, a corrupt file, a missing or unknown tensor.
    """
    folder = Path(folder)
    rank, alpha = _settings(folder / CONFIG)
    path = folder / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder of adapters holds {CONFIG} and {WEIGHTS}")
    try:
        tensors = safetensors.numpy.load_file(str(path))
    except (safetensors.SafetensorError, TypeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file of numpy's types ({error})") from error
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for name, x in tensors.items():
        match = TENSOR.fullmatch(name)
        if match is None or PARENT.get(match["name"]) != match["parent"]:
            raise ValueError(f"{path}: tensor {name!r} is no factor of a linear layer ({', '.join(PARENT)})")
        if x.ndim != 2 or rank not in x.shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {x.shape}, and {CONFIG} says r={rank}")
        factor = A if match["factor"] == "A" else B
        found.setdefault((match["name"], factor), {})[int(match["layer"])] = np.asarray(x, np.float32).T
    names = sorted({name for name, _ in found})
    depth = 1 + max((i for layers in found.values() for i in layers), default=-1)
    keys = [(name, factor) for name in names for factor in (A, B)]
    stacked = {("layers", *key): _stack(path, found, *key, depth) for key in keys}
    return Adapters(unflatten_dict(stacked), rank, alpha, tuple(names))


def _tensors(adapters: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    for (*outer, name, factor), stacked in flatten_dict(adapters).items():
        if outer != ["layers"] or name not in PARENT:
            raise ValueError(f"adapters of {'/'.join([*outer, name])} have no PEFT form: it has {', '.join(PARENT)}")
        for i, x in enumerate(np.asarray(stacked, np.float32)):
            key = f"base_model.model.model.layers.{i}.{PARENT[name]}.{name}.lora_{'A' if factor == A else 'B'}.weight"
            yield key, np.ascontiguousarray(x.T)


def _settings(path: Path) -> tuple[int, float]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a folder of adapters holds {CONFIG} and {WEIGHTS}")
    try:
        c = json.loads(path.read_text())
        kind, rank, alpha = c["peft_type"], c["r"], c["lora_alpha"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not a JSON object with peft_type, r and lora_alpha: {error!r}") from error
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r}; only 'LORA' is supported")
    for key, wanted in FIXED.items():
        if (c.get(key, wanted) or None) != (wanted or None):
            raise ValueError(f"{path}: {key} is {c[key]!r}; only {wanted!r} is supported")
    for key in ("rank_pattern", "alpha_pattern"):
        if c.get(key):
            raise ValueError(f"{path}: {key} is {c[key]!r}; only one rank and one alpha for all layers are supported")
    if not isinstance(rank, int) or rank < 1 or not 0 < float(alpha) < math.inf:
        raise ValueError(f"{path}: r must be at least 1 and lora_alpha positive, got {rank!r} and {alpha!r}")
    return rank, float(alpha)


def _stack(path: Path, found: dict[Any, dict[int, np.ndarray]], name: str, factor: str, depth: int) -> np.ndarray:
    layers = found.get((name, factor), {})
    if missing := sorted(set(range(depth)) - set(layers)):
        which = "lora_A" if factor == A else "lora_B"
        raise ValueError(f"{path}: no {which} of layer {missing[0]}'s {name}, though other layers or factors have it")
    if len({x.shape for x in layers.values()}) > 1:
        raise ValueError(f"{path}: the layers' factors of {name} differ in shape")
    return np.stack([layers[i] for i in range(depth)])
