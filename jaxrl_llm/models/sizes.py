"""Sizes of published models, to plan for without their files: what their `config.json` on Hugging Face says."""

from __future__ import annotations

from typing import Any

from jaxrl_llm.models.transformer import TransformerConfig

_COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)
_QWEN2 = {"rope_theta": 1e6, "qkv_bias": True}
_QWEN3 = {"rope_theta": 1e6, "qk_norm": True}
_LLAMA = {"rope_theta": 5e5, "rms_norm_eps": 1e-5}

# Name: sizes, what its family shares, and the parameters its card counts.
MODELS: dict[str, tuple[tuple[int, ...], dict[str, Any], float]] = {
    "qwen2.5-0.5b": ((896, 4864, 24, 14, 2, 64, 151936, True), _QWEN2, 0.494e9),
    "qwen2.5-1.5b": ((1536, 8960, 28, 12, 2, 128, 151936, True), _QWEN2, 1.544e9),
    "qwen2.5-3b": ((2048, 11008, 36, 16, 2, 128, 151936, True), _QWEN2, 3.086e9),
    "qwen2.5-7b": ((3584, 18944, 28, 28, 4, 128, 152064, False), _QWEN2, 7.616e9),
    "qwen2.5-14b": ((5120, 13824, 48, 40, 8, 128, 152064, False), _QWEN2, 14.77e9),
    "qwen2.5-32b": ((5120, 27648, 64, 40, 8, 128, 152064, False), _QWEN2, 32.76e9),
    "qwen2.5-72b": ((8192, 29568, 80, 64, 8, 128, 152064, False), _QWEN2, 72.71e9),
    "qwen3-0.6b": ((1024, 3072, 28, 16, 8, 128, 151936, True), _QWEN3, 0.596e9),
    "qwen3-1.7b": ((2048, 6144, 28, 16, 8, 128, 151936, True), _QWEN3, 1.721e9),
    "qwen3-4b": ((2560, 9728, 36, 32, 8, 128, 151936, True), _QWEN3, 4.022e9),
    "qwen3-8b": ((4096, 12288, 36, 32, 8, 128, 151936, False), _QWEN3, 8.191e9),
    "qwen3-14b": ((5120, 17408, 40, 40, 8, 128, 151936, False), _QWEN3, 14.77e9),
    "qwen3-32b": ((5120, 25600, 64, 64, 8, 128, 151936, False), _QWEN3, 32.76e9),
    "llama-3.2-1b": ((2048, 8192, 16, 32, 8, 64, 128256, True), _LLAMA, 1.236e9),
    "llama-3.2-3b": ((3072, 8192, 28, 24, 8, 128, 128256, True), _LLAMA, 3.213e9),
    "llama-3-8b": ((4096, 14336, 32, 32, 8, 128, 128256, False), _LLAMA, 8.030e9),
    "llama-3-70b": ((8192, 28672, 80, 64, 8, 128, 128256, False), _LLAMA, 70.55e9),
    "smollm2-135m": ((576, 1536, 30, 9, 3, 64, 49152, True), {"rope_theta": 1e5, "rms_norm_eps": 1e-5}, 0.1345e9),
}


def config(name: str, **changes: Any) -> TransformerConfig:
    """The configuration of a published model.

    Args:
      name: as in `MODELS`, in any case.
      changes: other fields of `TransformerConfig`, as `dtype`.

    Raises:
      ValueError: no such model.
    """
    if name.lower() not in MODELS:
        raise ValueError(f"no model named {name!r}; known are {', '.join(MODELS)}")
    sizes, family, _ = MODELS[name.lower()]
    fields: dict[str, Any] = {**dict(zip(_COLUMNS, sizes, strict=True)), **family, **changes}
    return TransformerConfig(**fields)
