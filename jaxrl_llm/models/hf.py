"""Hugging Face folders of the Llama, Qwen2 and Qwen3 families, read and written with numpy alone."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxrl_llm.models.transformer import TransformerConfig
from jaxrl_llm.types import PyTree

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)
# What we compute whatever the file says: {key: (the value we have, the value if the key is absent)}.
FIXED: dict[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "use_sliding_window": (False, False),
    "rope_scaling": (None, None),
    "quantization_config": (None, None),
    "pretraining_tp": (1, 1),
}


def load(folder: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> tuple[TransformerConfig, PyTree]:
    """Reads `config.json` and `model.safetensors` (or its shards).

    Args:
      folder: a local folder.
      dtype: of the computation; parameters are float32 whatever the file holds.

    Returns:
      the configuration and the parameters, numpy arrays in the layout of `transformer(config).init`.

    Raises:
      FileNotFoundError: a missing folder, configuration, weight file or shard.
      ValueError: a configuration this transformer does not compute, a corrupt file, a missing tensor or a wrong shape.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG, dtype)
    where = _files(folder)
    readers: dict[Path, Any] = {}

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in where:
            raise ValueError(f"{folder}: no tensor {name!r}; {CONFIG} says the model has one")
        path = where[name]
        if path not in readers:
            readers[path] = _open(path)
        try:
            tensor = readers[path].get_tensor(name)
        except (safetensors.SafetensorError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: cannot read tensor {name!r}: {error}") from error
        if tensor.shape != shape:
            raise ValueError(f"{path}: tensor {name!r} has shape {tensor.shape}, but {CONFIG} asks for {shape}")
        return np.asarray(tensor, np.float32)

    return config, _assemble(config, read)


def save(folder: str | os.PathLike[str], config: TransformerConfig, params: PyTree, tokenizer: Any = None) -> None:
    """Writes a folder that `load`, and transformers' `from_pretrained`, read.

    Each file appears whole or not at all, the configuration last; a new folder appears at once.

    Args:
      folder: replaced file by file where it exists.
      config: `qk_norm` makes it a Qwen3, `qkv_bias` a Qwen2, neither a Llama.
      params: float32, layout of `transformer(config).init`.
      tokenizer: anything with `save_pretrained(folder)`.

    Raises:
      ValueError: a configuration no family has, or parameters that do not fit it.
    """
    folder = Path(folder)
    settings = json.dumps(_settings(config), indent=2) + "\n"
    tensors = {name: np.ascontiguousarray(x) for name, x in _tensors(config, params)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as fresh:
        new = Path(fresh) / "new"
        new.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        safetensors.numpy.save_file(tensors, str(new / WEIGHTS), metadata={"format": "pt"})
        (new / CONFIG).write_text(settings)
        if not folder.exists():
            os.replace(new, folder)
            return
        for path in sorted(new.iterdir(), key=lambda path: (path.name == CONFIG, path.name)):
            os.replace(path, folder / path.name)
        (folder / INDEX).unlink(missing_ok=True)


# --- configuration ----------------------------------------------------------------------------------------------------


def _config(path: Path, dtype: Any) -> TransformerConfig:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        c = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    kind = c.get("model_type") if isinstance(c, dict) else None
    if kind not in ARCHITECTURES:
        raise ValueError(f"{path}: model_type is {kind!r}; supported are {', '.join(ARCHITECTURES)}")
    if missing := [key for key in SIZES if key not in c]:
        raise ValueError(f"{path}: no {missing[0]!r}")
    # Qwen2's files name a bias switch only by accident: the family has biases on q, k and v, always.
    fixed = {k: v for k, v in FIXED.items() if not (kind == "qwen2" and k == "attention_bias")}
    for key, (wanted, absent) in fixed.items():
        if c.get(key, absent) != wanted:
            raise ValueError(f"{path}: {key} is {c[key]!r}; only {wanted!r} is supported")
    if other := sorted(set(c.get("layer_types") or ()) - {"full_attention"}):
        raise ValueError(f"{path}: layer_types has {other[0]!r}; only 'full_attention' is supported")
    return TransformerConfig(
        **{key: c[key] for key in SIZES},
        head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        rope_theta=_rope_theta(path, c),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tie_word_embeddings=c.get("tie_word_embeddings", False),
        dtype=dtype,
    )


def _rope_theta(path: Path, c: dict[str, Any]) -> float:
    rope = c.get("rope_parameters") or {}
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"{path}: rope_parameters.rope_type is {kind!r}; only 'default' (no scaling) is supported")
    theta = rope.get("rope_theta", c.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{path}: no rope_theta, neither in rope_parameters nor beside it")
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is {partial}; only 1.0 is supported")
    return float(theta)


def _settings(config: TransformerConfig) -> dict[str, Any]:
    if config.qkv_bias and config.qk_norm:
        raise ValueError("no family has both qkv_bias and qk_norm: this configuration has no Hugging Face form")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        **{key: getattr(config, key) for key in (*SIZES, "head_dim", "tie_word_embeddings")},
        "hidden_act": "silu",
        "max_position_embeddings": 32_768,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,  # where older readers look
        "dtype": "float32",
    }


# --- weights ----------------------------------------------------------------------------------------------------------


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    if (whole := folder / WEIGHTS).is_file():
        return dict.fromkeys(_open(whole).keys(), whole)
    if not (index := folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder}: neither {WEIGHTS} nor {INDEX}; other weight formats are not read")
    try:
        names = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a JSON object with a 'weight_map' of tensor names to files") from error


def _open(path: Path) -> Any:
    try:
        return safetensors.safe_open(str(path), framework="np")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file, but {INDEX} names it") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error}); was its copying cut off?") from error


def _layer(config: TransformerConfig) -> Iterator[tuple[tuple[str, str], str, tuple[int, ...]]]:
    """Every parameter of a layer: our path, the file's name after `model.layers.i.`, the shape in the file."""
    c = config
    wide, narrow = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    for name, out in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
        yield (name, "kernel"), f"self_attn.{name}.weight", (out, c.hidden_size)
        if c.qkv_bias:
            yield (name, "bias"), f"self_attn.{name}.bias", (out,)
    yield ("o_proj", "kernel"), "self_attn.o_proj.weight", (c.hidden_size, wide)
    if c.qk_norm:
        yield ("q_norm", "scale"), "self_attn.q_norm.weight", (c.head_dim,)
        yield ("k_norm", "scale"), "self_attn.k_norm.weight", (c.head_dim,)
    yield ("gate_proj", "kernel"), "mlp.gate_proj.weight", (c.intermediate_size, c.hidden_size)
    yield ("up_proj", "kernel"), "mlp.up_proj.weight", (c.intermediate_size, c.hidden_size)
    yield ("down_proj", "kernel"), "mlp.down_proj.weight", (c.hidden_size, c.intermediate_size)
    yield ("input_norm", "scale"), "input_layernorm.weight", (c.hidden_size,)
    yield ("mlp_norm", "scale"), "post_attention_layernorm.weight", (c.hidden_size,)


def _assemble(config: TransformerConfig, read: Callable[[str, tuple[int, ...]], np.ndarray]) -> PyTree:
    c = config
    layers: dict[str, dict[str, np.ndarray]] = {}
    for (module, leaf), name, shape in _layer(c):
        # Filled layer by layer: a stack of a list would hold every layer twice.
        stacked = np.empty((c.num_hidden_layers, *shape[::-1]), np.float32)
        for i in range(c.num_hidden_layers):
            stacked[i] = read(f"model.layers.{i}.{name}", shape).T
        layers.setdefault(module, {})[leaf] = stacked
    params = {
        "embed": read("model.embed_tokens.weight", (c.vocab_size, c.hidden_size)),
        "layers": layers,
        "norm": {"scale": read("model.norm.weight", (c.hidden_size,))},
    }
    if not c.tie_word_embeddings:
        params["lm_head"] = np.ascontiguousarray(read("lm_head.weight", (c.vocab_size, c.hidden_size)).T)
    return params


def _tensors(config: TransformerConfig, params: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    c = config

    def of(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        leaf = params
        for name in path:
            if name not in leaf:
                raise ValueError(f"params has no {'/'.join(path)!r}, which the configuration asks for")
            leaf = leaf[name]
        if leaf.shape != shape:
            name = "/".join(path)
            raise ValueError(f"params[{name!r}] has shape {leaf.shape}, but the configuration asks for {shape}")
        return np.asarray(leaf, np.float32)

    yield "model.embed_tokens.weight", of(("embed",), (c.vocab_size, c.hidden_size))
    yield "model.norm.weight", of(("norm", "scale"), (c.hidden_size,))
    if not c.tie_word_embeddings:
        yield "lm_head.weight", of(("lm_head",), (c.hidden_size, c.vocab_size)).T
    for path, name, shape in _layer(c):
        stacked = of(("layers", *path), (c.num_hidden_layers, *shape[::-1]))
        for i in range(c.num_hidden_layers):
            yield f"model.layers.{i}.{name}", stacked[i].T
