"""Configurations as published: what they mean, and the number of parameters that their makers give."""

from __future__ import annotations

import math

import jax.numpy as jnp
import pytest

from jaxrl_llm.models.config import RopeScaling
from jaxrl_llm.models.families import read_settings, write_settings
from jaxrl_llm.models.weights import stored

COMMON = {
    "architectures": ["AForCausalLM"],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0",
    "use_cache": True,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "attention_dropout": 0.0,
}
LLAMA = {"model_type": "llama", "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "pretraining_tp": 1}
QWEN = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "use_sliding_window": False,
}
GEMMA = {"attention_bias": False, "cache_implementation": "hybrid", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA |= {"head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "pad_token_id": 0}


def sizes(hidden, inner, layers, heads, kv, **more):
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    return dict(zip(names, (hidden, inner, layers, heads, kv), strict=True)) | more


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}
PUBLISHED = {
    "Llama 3.1 8B": (
        8.030e9,
        LLAMA
        | sizes(4096, 14336, 32, 32, 8, vocab_size=128256, rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=False)
        | {"rope_scaling": LLAMA3_ROPE, "max_position_embeddings": 131072},
        {"rope_scaling": RopeScaling(**LLAMA3_ROPE), "max_position_embeddings": 131072, "sliding_window": None},
    ),
    "SmolLM2 135M": (
        134.5e6,
        LLAMA
        | sizes(576, 1536, 30, 9, 3, vocab_size=49152, rms_norm_eps=1e-5, rope_theta=1e5, tie_word_embeddings=True)
        | {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "transformers.js_config": {}},
        {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "Mistral 7B v0.1": (
        7.242e9,
        {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 4096}
        | sizes(4096, 14336, 32, 32, 8, vocab_size=32000, tie_word_embeddings=False),
        {"sliding": (True,) * 32},
    ),
    "Qwen2.5 0.5B": (
        494.0e6,
        QWEN
        | sizes(896, 4864, 24, 14, 2, model_type="qwen2", tie_word_embeddings=True)
        | {"sliding_window": 32768, "max_window_layers": 21},
        {"sliding": (False,) * 24, "qkv_bias": True, "head_dim": 64},
    ),
    "Qwen3 0.6B": (
        596.0e6,
        QWEN
        | sizes(1024, 3072, 28, 16, 8, model_type="qwen3", tie_word_embeddings=True, head_dim=128)
        | {"sliding_window": None, "max_window_layers": 28, "rope_scaling": None, "attention_bias": False},
        {"qk_norm": True, "head_dim": 128},
    ),
    "Qwen3 30B-A3B": (
        30.53e9,
        QWEN
        | sizes(2048, 6144, 48, 32, 4, model_type="qwen3_moe", tie_word_embeddings=False, head_dim=128)
        | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
        | {"router_aux_loss_coef": 0.001, "sliding_window": None, "max_window_layers": 48},
        {"num_experts": 128, "norm_topk_prob": True},
    ),
    "Gemma 2 2B": (
        2.614e9,
        GEMMA
        | sizes(2304, 9216, 26, 8, 4, model_type="gemma2", vocab_size=256000, rope_theta=1e4, sliding_window=4096)
        | {"hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        {"sliding": (True, False) * 13, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma 3 1B": (
        999.9e6,
        GEMMA
        | sizes(1152, 6912, 26, 4, 1, model_type="gemma3_text", vocab_size=262144, rope_theta=1e6, sliding_window=512)
        | {"rope_local_base_freq": 1e4, "rope_scaling": None, "sliding_window_pattern": 6}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"sliding": (*((True,) * 5 + (False,)) * 4, True, True), "rope_local_base_freq": 1e4, "qk_norm": True},
    ),
    "Gemma 3 4B, its text model": (
        3.880e9,
        {"model_type": "gemma3", "vision_config": {}, "mm_tokens_per_image": 256}
        | {
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
            | {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
        },
        {"rope_scaling": RopeScaling(rope_type="linear", factor=8.0), "rope_theta": 1e6, "sliding_window": 1024},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration(name):
    count, settings, meaning = PUBLISHED[name]
    config = read_settings(COMMON | settings, name, dtype=jnp.float32)
    assert sum(math.prod(parameter.whole) for parameter in stored(config)) == pytest.approx(count, rel=5e-4)
    for field, value in meaning.items():
        assert getattr(config, field) == value, field
    assert read_settings(write_settings(config), "again", dtype=jnp.float32) == config
