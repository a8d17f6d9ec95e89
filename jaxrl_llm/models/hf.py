"""Hugging Face folders of the families in `families.py`, read and written without PyTorch."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.families import FAMILIES, SIZES, read_settings, write_settings
from jaxrl_llm.models.transformer import TransformerConfig
from jaxrl_llm.models.weights import CONFIG, INDEX, WEIGHTS, Folder, Shardings, assemble, stored, write
from jaxrl_llm.types import PyTree

__all__ = ["CONFIG", "FAMILIES", "INDEX", "SIZES", "WEIGHTS", "load", "load_all", "read_config", "save"]

GENERATION = "generation_config.json"
SHARD = 5 * 10**9  # bytes


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    sharding: Shardings | None = None,
    ignore: Collection[str] = (),
) -> tuple[TransformerConfig, PyTree]:
    """Reads `config.json` and `model.safetensors` (or its shards).

    Of a Gemma 3 that sees images (`model_type` "gemma3") the text model is read, and the rest left out.

    Args:
      folder: a local folder.
      dtype: of the computation; parameters are float32 whatever the file holds.
      sharding: where each parameter shall live, `{path: Sharding}` or `(path, shape) -> Sharding` with paths like
        "layers/q_proj/kernel". Each device's slice is read from the files on its own, and the host holds one slice at
        a time. None: numpy arrays.
      ignore: keys of `config.json` and names of tensors that are unknown here and known to change nothing.

    Returns:
      the configuration and the parameters, in the layout of `transformer(config).init`.

    Raises:
      FileNotFoundError: a missing folder, configuration, weight file or shard.
      ValueError: a configuration this transformer does not compute, a corrupt file, a missing tensor, a wrong shape, or
        a tensor that belongs to no parameter.
    """
    config, params, _ = load_all(Path(folder), dtype=dtype, sharding=sharding, ignore=ignore)
    return config, params


def load_all(
    folder: Path, *, dtype: Any, sharding: Shardings | None, ignore: Collection[str]
) -> tuple[TransformerConfig, PyTree, str]:
    """As `load`; and the widest type of the files' tensors, as "bfloat16"."""
    config = read_config(folder, dtype=dtype, ignore=ignore)
    files, parameters = Folder(folder), stored(config)
    kind = files.check(parameters, ignore)
    return config, assemble(files, parameters, sharding), kind


def read_config(
    folder: str | os.PathLike[str], *, dtype: Any = jnp.float32, ignore: Collection[str] = ()
) -> TransformerConfig:
    """What `config.json` in a folder means; see `load`."""
    return read_settings(_settings(Path(folder) / CONFIG), str(Path(folder) / CONFIG), dtype=dtype, ignore=ignore)


def config(path: str | os.PathLike[str], *, dtype: Any = jnp.float32) -> TransformerConfig:
    """What a `config.json` alone means; arguments and errors as `load`."""
    return read_settings(_settings(Path(path)), str(path), dtype=dtype)


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a model folder holds {CONFIG} and {WEIGHTS}")
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    return settings


def save(
    folder: str | os.PathLike[str],
    config: TransformerConfig,
    params: PyTree,
    tokenizer: Any = None,
    *,
    dtype: Any = np.float32,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: int = SHARD,
) -> None:
    """Writes a folder that `load`, and transformers' `from_pretrained`, read.

    A new folder appears at once. In one that exists, each file appears whole or not at all, the weights change in one
    moment, and the configuration comes last.

    Args:
      folder: replaced file by file where it exists.
      config: saved as a model of its `model_type`, or of the first family that has its switches.
      params: layout of `transformer(config).init`; numpy or JAX arrays, taken to the host one file at a time.
      tokenizer: anything with `save_pretrained(folder)`.
      dtype: of the tensors in the files.
      generation_config: the content of `generation_config.json`.
      shard_bytes: files of weights are not larger than this, unless one tensor is.

    Raises:
      ValueError: a configuration no family has, or parameters that do not fit it.
    """
    folder = Path(folder)
    named = np.dtype(dtype).name
    if named not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {named}; weights are saved as float32, bfloat16 or float16")
    settings = write_settings(config) | {"dtype": named} | _special(tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", ignore_cleanup_errors=True) as fresh:
        new = Path(fresh) / "new"
        new.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(str(new))
        if generation_config is not None:
            _write(new / GENERATION, generation_config)
        # Shards of two models under the same names would mix while they are replaced.
        tag = f"-{secrets.token_hex(4)}" if folder.exists() else ""
        write(new, stored(config), params, dtype=dtype, limit=shard_bytes, tag=tag)
        _write(new / CONFIG, settings)
        if not folder.exists():
            os.replace(new, folder)
            return
        _replace(folder, new)


def _special(tokenizer: Any) -> dict[str, int | None]:
    """Said even where there are none: transformers would take a family's numbers instead."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(tokenizer, name, None) for name in names}


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(folder: Path, new: Path) -> None:
    """Moves the files of `new` into `folder`; one file's appearance, or the removal of one, changes all the weights."""
    old = _shards(folder)
    order = {INDEX: 2, CONFIG: 3}  # the index after its shards, the configuration after all
    names = sorted((path.name for path in new.iterdir()), key=lambda name: (order.get(name, 1), name))
    for name in names[:-1]:
        os.replace(new / name, folder / name)
    # A whole file is preferred to an index: it goes once all shards are there, and the index once the whole file is.
    (folder / (WEIGHTS if INDEX in names else INDEX)).unlink(missing_ok=True)
    for path in old:
        path.unlink(missing_ok=True)
    os.replace(new / CONFIG, folder / CONFIG)


def _shards(folder: Path) -> set[Path]:
    try:
        return {folder / name for name in json.loads((folder / INDEX).read_text())["weight_map"].values()} - {
            folder / WEIGHTS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no index, or none that names its shards
        return set()
