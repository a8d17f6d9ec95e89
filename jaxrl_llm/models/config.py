"""What a transformer computes, under the names of Hugging Face configurations where they have one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
ROPE_TYPES = ("linear", "llama3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotary frequencies, for texts longer than those of pretraining.

    rope_type: "linear" divides every frequency by `factor` (2306.15595); "llama3" those with fewer than
        `low_freq_factor` turns in `original_max_position_embeddings` tokens, leaves those with more than
        `high_freq_factor` turns, and interpolates between (Llama 3.1, 2407.21783).

    Raises:
      ValueError: another type, or factors that do not fit each other.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type is {self.rope_type!r}; supported are 'default' and {', '.join(ROPE_TYPES)}")
        if self.factor < 1:
            raise ValueError(f"the factor of rope scaling must be at least 1, got {self.factor}")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor ({self.high_freq_factor})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes and switches. Configurations that mean the same are equal, whatever the spelling.

    layer_types: "full_attention" or "sliding_attention" for each layer. Empty: all alike, sliding if there is a
        `sliding_window`.
    sliding_window: a query sees the keys less than this many positions before it, itself included.

    Raises:
      ValueError: sizes that do not fit each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3, Gemma 3
    tie_word_embeddings: bool = True
    dtype: Any = jnp.float32  # of the computation; parameters are float32
    # None, "full", or the name of a policy in jax.checkpoint_policies. Keeping only what weights were multiplied into
    # halves the memory of a gradient and is faster than writing and reading back the rest.
    remat: str | None = "dots_with_no_batch_dims_saveable"
    split_tokens: bool = False  # between the parts of a layer, over the mesh axis `tensor`: keeps less, exchanges more
    rope_scaling: RopeScaling | None = None  # of all layers, or of the full ones if there is a rope_local_base_freq
    rope_local_base_freq: float | None = None  # the theta of sliding layers, if it is another (Gemma 3)
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    hidden_act: str = "silu"
    query_pre_attn_scalar: float | None = None  # scores are divided by its root; None: head_dim
    attn_logit_softcapping: float | None = None  # c: scores are c tanh(scores / c)
    final_logit_softcapping: float | None = None  # the same of logits
    unit_offset_norm: bool = False  # RMSNorm multiplies by 1 + scale (Gemma)
    sandwich_norms: bool = False  # norms behind attention and MLP too (Gemma 2 and 3)
    scale_embeddings: bool = False  # by the root of hidden_size (Gemma)
    num_experts: int = 0  # 0: every token goes through one MLP of intermediate_size (Qwen3 MoE)
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0  # of an expert
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1
    experts_implementation: str = "dense"  # or "ragged", for TPUs: see models/experts.py
    max_position_embeddings: int = dataclasses.field(default=32_768, compare=False)  # nothing computes with it
    # Sampling loops over layers inside the program too, instead of writing each of them out: deep models compile in the
    # time of a shallow one, and a CPU computes more slowly. See models/scanned.py.
    scan_decode: bool = dataclasses.field(default=False, compare=False)
    # Of whole sequences: "xla", or on a TPU "splash", a kernel that never holds queries by keys. See models/splash.py.
    attention: str = dataclasses.field(default="xla", compare=False)
    # The family whose form `hf.save` gives it; None: the first that has these switches.
    model_type: str | None = dataclasses.field(default=None, compare=False)

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Which layers see a window only."""
        if self.layer_types:
            return tuple(kind == SLIDING for kind in self.layer_types)
        return (self.sliding_window is not None,) * self.num_hidden_layers

    def first_layers(self, n: int) -> TransformerConfig:
        """The configuration of the first `n` layers alone."""
        return dataclasses.replace(self, num_hidden_layers=n, layer_types=self.layer_types[:n])

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.attention not in ("xla", "splash"):
            raise ValueError(f"attention must be 'xla' or 'splash', got {self.attention!r}")
        if self.attention == "splash" and (self.sliding_window or self.attn_logit_softcapping):
            has = "sliding windows" if self.sliding_window else "soft caps"
            raise ValueError(f"attention='splash' computes plain causal attention, and this model has {has}: use 'xla'")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        if self.remat not in (None, "full") and not hasattr(jax.checkpoint_policies, self.remat):
            raise ValueError(f"remat must be None, 'full' or a name in jax.checkpoint_policies, got {self.remat!r}")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act is {self.hidden_act!r}; supported are {', '.join(ACTIVATIONS)}")
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and num_experts "
                f"({self.num_experts})"
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise ValueError(f"experts need a moe_intermediate_size, got {self.moe_intermediate_size}")
        if self.experts_implementation not in ("dense", "ragged"):
            raise ValueError(f"experts_implementation must be 'dense' or 'ragged', got {self.experts_implementation!r}")
        self._check_layers()
        self._say_it_one_way()

    def _check_layers(self) -> None:
        if other := sorted(set(self.layer_types) - {FULL, SLIDING}):
            raise ValueError(f"layer_types has {other[0]!r}; supported are {FULL!r} and {SLIDING!r}")
        if self.layer_types and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types names {len(self.layer_types)} layers of {self.num_hidden_layers}")
        if any(self.sliding) and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(f"sliding layers need a sliding_window of at least 1, got {self.sliding_window}")
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} must be positive or None, got {value}")

    def _say_it_one_way(self) -> None:
        if self.layer_types and not any(self.sliding):
            object.__setattr__(self, "sliding_window", None)
        if len(set(self.layer_types)) == 1:
            object.__setattr__(self, "layer_types", ())
        if self.query_pre_attn_scalar == self.head_dim:
            object.__setattr__(self, "query_pre_attn_scalar", None)
