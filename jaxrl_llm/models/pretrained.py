"""A checkpoint with all that belongs to it: weights, tokenizer, generation settings, chat template."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxrl_llm.models import hf
from jaxrl_llm.models.transformer import TransformerConfig
from jaxrl_llm.models.weights import Shardings
from jaxrl_llm.types import PyTree

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # of a repository, what is downloaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """What `load` returns.

    config: of `transformer(config)`.
    params: in its layout, float32.
    tokenizer: of transformers, with an EOS and a padding token that differ.
    generation_config: the content of `generation_config.json`; empty if there is none.
    dtype: the widest type of the tensors in the files, as "bfloat16".
    """

    config: TransformerConfig
    params: PyTree
    tokenizer: Any
    generation_config: dict[str, Any]
    dtype: str

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that turns messages into a prompt."""
        template: str | None = getattr(self.tokenizer, "chat_template", None)
        return template


def load(
    path_or_repo_id: str | os.PathLike[str],
    *,
    dtype: Any = jnp.float32,
    sharding: Shardings | None = None,
    revision: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    ignore: Collection[str] = (),
) -> Pretrained:
    """Reads a checkpoint from a folder, or downloads it from the Hugging Face hub first.

    Args:
      path_or_repo_id: a local folder, or "owner/name" on the hub (or in its cache, with `HF_HUB_OFFLINE=1`).
      dtype: of the computation; parameters are float32 whatever the files hold.
      sharding: where each parameter shall live, see `hf.load`; None: numpy arrays.
      revision: a branch, tag or commit of the repository.
      eos_token, pad_token: tokens to use, where the tokenizer names none or one for both.
      ignore: see `hf.load`.

    Raises:
      FileNotFoundError: there is no such folder or repository, or a file is missing.
      ValueError: as `hf.load`; the tokenizer knows more tokens than the embedding, or lacks EOS or padding.
    """
    folder = find(path_or_repo_id, revision)
    config = hf.read_config(folder, dtype=dtype, ignore=ignore)
    # The cheap checks first: weights take minutes.
    tokenizer = _checked(tokenizer_of(folder), folder, config.vocab_size, eos_token, pad_token)
    generation = _generation(folder, config.vocab_size)
    config, params, kind = hf.load_all(folder, dtype=dtype, sharding=sharding, ignore=ignore)
    return Pretrained(config=config, params=params, tokenizer=tokenizer, generation_config=generation, dtype=kind)


def save(
    path: str | os.PathLike[str], model: Pretrained, *, dtype: Any = "float32", shard_bytes: int = hf.SHARD
) -> None:
    """Writes a folder that `load`, and transformers' `from_pretrained`, read; whole or not at all, see `hf.save`.

    Args:
      path: the folder.
      model: with the parameters to save: `dataclasses.replace(model, params=trained)`.
      dtype: of the tensors in the files; `model.dtype` gives the files that were read, to the bit.
      shard_bytes: files of weights are not larger than this, unless one tensor is.
    """
    hf.save(
        path,
        model.config,
        model.params,
        model.tokenizer,
        dtype=dtype,
        generation_config=model.generation_config or None,
        shard_bytes=shard_bytes,
    )


def find(path_or_repo_id: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a checkpoint, downloaded if it is a repository.

    Raises:
      FileNotFoundError: it is neither.
    """
    folder = Path(path_or_repo_id)
    if folder.is_dir():
        return folder
    name = os.fspath(path_or_repo_id)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise FileNotFoundError(f"{name}: no such folder (and no name of a repository, which is 'owner/name')")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:  # a dozen classes, of three packages
        raise FileNotFoundError(f"{name}: no such folder, and no repository that can be downloaded: {error}") from error


def tokenizer_of(folder: Path) -> Any:
    """What `tokenizer.json` says, to the letter, unless the folder names a family's own class.

    For some model types AutoTokenizer puts its own rules in the place of those in the file.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: its files cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    path = folder / "tokenizer_config.json"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise FileNotFoundError(
            f"{folder}: no tokenizer.json, tokenizer.model or vocab.json; hf.load reads weights alone"
        )
    try:
        named = json.loads(path.read_text()).get("tokenizer_class") if path.is_file() else None
        plain = named in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file()
        return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # whatever JSON, tokenizers or a family's class raises
        raise ValueError(f"{folder}: the tokenizer's files cannot be read: {error}") from error


def _checked(tokenizer: Any, folder: Path, vocab: int, eos_token: str | None, pad_token: str | None) -> Any:
    for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
        if token is not None:
            if token not in tokenizer.get_vocab():
                raise ValueError(f"{folder}: the tokenizer does not know {name}={token!r}")
            setattr(tokenizer, name, token)
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab:
        raise ValueError(
            f"{folder}: the tokenizer has ids up to {largest}, but model.embed_tokens.weight has {vocab} rows "
            f"(vocab_size in {hf.CONFIG})"
        )
    where = f"{folder / 'tokenizer_config.json'}"
    for name in ("eos_token", "pad_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(f"{where}: the tokenizer has no {name}; load with {name}=..., a token of its vocabulary")
    if tokenizer.eos_token_id == tokenizer.pad_token_id:
        raise ValueError(
            f"{where}: {tokenizer.eos_token!r} is EOS and padding, so that no end could be told from none; load "
            "with pad_token=..., another token of its vocabulary"
        )
    return tokenizer


def _generation(folder: Path, vocab: int) -> dict[str, Any]:
    path = folder / hf.GENERATION
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: not a JSON object")
    eos = settings.get("eos_token_id")
    for token in eos if isinstance(eos, list) else [eos]:
        if token is not None and not 0 <= token < vocab:
            raise ValueError(f"{path}: eos_token_id is {token}, but the model has {vocab} tokens")
    return settings
