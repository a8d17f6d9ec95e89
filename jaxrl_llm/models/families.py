"""`config.json` of the families we compute, read into a `TransformerConfig` and written from one.

Every key of a file is read, or must have the one value we compute, or is known to change nothing. Any other is refused
by its name: a model that is computed wrongly still writes text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from jaxrl_llm.models.config import FULL, SLIDING, RopeScaling, TransformerConfig

Settings = dict[str, Any]

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
)
COMMON = {*SIZES, "head_dim", "tie_word_embeddings", "max_position_embeddings", "model_type"}
COMMON |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
# What we compute whatever the file says: {key: (the values that mean it, the first if the key is absent)}.
FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
    "pretraining_tp": (1,),
    "rope_interleaved": (False,),
    "use_bidirectional_attention": (None, False),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# What is about storage, training from scratch, generation or other programs.
HARMLESS = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path", "id2label", "label2id", "num_labels"),
    *("output_attentions", "output_hidden_states", "return_dict", "problem_type", "chunk_size_feed_forward"),
    *("cache_implementation", "is_llama_config", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
    *("_attn_implementation_autoset", "task_specific_params", "finetuning_task", "use_flash_attn"),
}
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
MIXTURE = ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")
HOW = ("dtype", "remat", "experts_implementation")  # of the computation, not of the model
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart.

    architecture: transformers' class.
    switches: fields of `TransformerConfig` its models have, whatever the file says.
    fields: keys of its files that are fields of the same name.
    keys: what else its files say besides `COMMON`.
    layers: `(settings) -> (sliding_window, layer_types)`.
    form: `(config) -> settings` of those keys.
    defaults: what transformers takes where a file is silent.
    """

    architecture: str
    switches: dict[str, Any]
    fields: tuple[str, ...]
    keys: tuple[str, ...]
    layers: Callable[[Settings], tuple[int | None, tuple[str, ...]]]
    form: Callable[[TransformerConfig], Settings]
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    fixed: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)


def read_settings(settings: Settings, where: str, *, dtype: Any, ignore: Collection[str] = ()) -> TransformerConfig:
    """The configuration a `config.json` means.

    Args:
      settings: its content.
      where: its path, for errors.
      dtype: of the computation.
      ignore: unknown keys that are known to change nothing.

    Raises:
      ValueError: another family, a missing size, a value or a key this transformer does not compute.
    """
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind == "gemma3" and isinstance(settings.get("text_config"), dict):
        # A Gemma 3 that sees images; what it does with text alone is its text model.
        settings, kind = (
            {"tie_word_embeddings": True, **settings["text_config"], "model_type": "gemma3_text"},
            "gemma3_text",
        )
    if kind not in FAMILIES:
        raise ValueError(f"{where}: model_type is {kind!r}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    c = {**family.defaults, **settings}
    if missing := [key for key in (*SIZES, *family.fields) if key not in c]:
        raise ValueError(f"{where}: no {missing[0]!r}")
    if c["num_key_value_heads"] is None:
        c["num_key_value_heads"] = c["num_attention_heads"]
    for key in SIZES:
        if isinstance(c[key], bool) or not isinstance(c[key], int | float) or c[key] <= 0:
            raise ValueError(f"{where}: {key} is {c[key]!r}, not a positive number")
    _check_keys(c, kind, where, ignore)
    try:
        window, layer_types = family.layers(c)
        return TransformerConfig(
            **{key: c[key] for key in SIZES},
            **family.switches,
            **_rope(c, kind, where),
            **{key: c[key] for key in family.fields},
            **_named_otherwise(c, family),
            sliding_window=window,
            layer_types=layer_types,
            head_dim=c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
            tie_word_embeddings=c.get("tie_word_embeddings", False),
            max_position_embeddings=c.get("max_position_embeddings", 32_768),
            model_type=kind,
            dtype=dtype,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(str(error) if str(error).startswith(where) else f"{where}: {error}") from error


def write_settings(config: TransformerConfig) -> Settings:
    """The `config.json` of a configuration: of its own family, else of the first that has its switches.

    Raises:
      ValueError: no family computes this.
    """
    kinds = list(FAMILIES) if config.model_type is None else [config.model_type]
    for kind in kinds:
        settings = _settings(config, kind)
        try:
            again = read_settings(settings, "config.json", dtype=config.dtype)
        except ValueError:  # sizes another family needs
            continue
        how = {name: getattr(config, name) for name in HOW}
        if dataclasses.replace(again, **how) == config:
            return settings
    fields = [f for f in dataclasses.fields(config) if f.compare and f.name not in (*HOW, "rope_theta")]
    odd = [f.name for f in fields if f.default is not dataclasses.MISSING and getattr(config, f.name) != f.default]
    raise ValueError(f"no Hugging Face form ({', '.join(kinds)}) has this combination: {', '.join(odd)}")


def _check_keys(c: Settings, kind: str, where: str, ignore: Collection[str]) -> None:
    family = FAMILIES[kind]
    for key, wanted in {**FIXED, **family.fixed}.items():
        if key not in family.keys and c.get(key, wanted[0]) not in wanted:
            raise ValueError(f"{where}: {key} is {c[key]!r}; only {wanted[0]!r} is supported")
    if "layer_types" not in family.keys and (other := sorted(set(c.get("layer_types") or ()) - {FULL})):
        raise ValueError(f"{where}: layer_types has {other[0]!r}; a {kind} has {FULL!r} only")
    known = COMMON | set(FIXED) | HARMLESS | {*family.fields, *family.keys, *family.fixed, "layer_types"}
    # What is off changes nothing, whatever it would do.
    unknown = [key for key, value in c.items() if key not in known and key not in ignore and value not in (None, False)]
    if unknown:
        key = unknown[0]
        raise ValueError(
            f"{where}: {key} is {c[key]!r}, which is unknown here and may change what a {kind} computes; if it changes "
            f"nothing, load with ignore=({key!r},)"
        )


def _named_otherwise(c: Settings, family: Family) -> Settings:
    """Keys that have another name in files."""
    found: Settings = {}
    if "hidden_activation" in family.keys:
        found["hidden_act"] = c.get("hidden_activation") or "gelu_pytorch_tanh"
        if c.get("hidden_act", found["hidden_act"]) != found["hidden_act"]:
            raise ValueError(f"hidden_act is {c['hidden_act']!r}, but hidden_activation {found['hidden_act']!r}")
    if "num_experts" in family.keys:
        found["num_experts"] = c.get("num_local_experts", c.get("num_experts"))
        if not found["num_experts"]:
            raise ValueError("no 'num_experts'")
    return found


# --- layers -----------------------------------------------------------------------------------------------------------


def _no_window(c: Settings) -> tuple[None, tuple[str, ...]]:
    return None, ()


def _one_window(c: Settings) -> tuple[int | None, tuple[str, ...]]:
    return c.get("sliding_window"), ()


def _late_windows(c: Settings) -> tuple[int | None, tuple[str, ...]]:
    if not c.get("use_sliding_window", False):
        return None, tuple(c.get("layer_types") or ())
    first = c.get("max_window_layers", 28)
    types = (SLIDING if i >= first else FULL for i in range(c["num_hidden_layers"]))
    return c.get("sliding_window"), tuple(c.get("layer_types") or types)


def _switched_window(c: Settings) -> tuple[int | None, tuple[str, ...]]:
    return (c.get("sliding_window") if c.get("use_sliding_window", False) else None), ()


def _alternating(c: Settings) -> tuple[int | None, tuple[str, ...]]:
    """Every n-th layer sees everything."""
    n = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or (2 if c["model_type"] == "gemma2" else 6)
    types = (SLIDING if (i + 1) % n else FULL for i in range(c["num_hidden_layers"]))
    return c.get("sliding_window"), tuple(c.get("layer_types") or types)


def _types(config: TransformerConfig) -> list[str]:
    return [SLIDING if sliding else FULL for sliding in config.sliding]


# --- rotary positions -------------------------------------------------------------------------------------------------


def _rope(c: Settings, kind: str, where: str) -> Settings:
    rope, found = dict(c.get("rope_parameters") or {}), {}
    if "rope_local_base_freq" in FAMILIES[kind].keys:
        local = rope.pop("sliding_attention", None) or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"{where}: rope_parameters.sliding_attention.rope_type is {local['rope_type']!r}; only "
                "'default' is supported"
            )
        found["rope_local_base_freq"] = float(local.get("rope_theta") or c.get("rope_local_base_freq") or 10_000.0)
        rope = {**(rope.pop("full_attention", None) or {}), **rope}
    older = dict(c.get("rope_scaling") or {})
    rope |= {"rope_type": older.pop("type"), **older} if "type" in older else older
    theta = rope.get("rope_theta", c.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{where}: no rope_theta, neither in rope_parameters nor beside it")
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial not in (1.0, None):
        raise ValueError(f"{where}: partial_rotary_factor is {partial}; only 1.0 is supported")
    return {**found, "rope_theta": float(theta), "rope_scaling": _scaling(c, rope, where)}


def _scaling(c: Settings, rope: Settings, where: str) -> RopeScaling | None:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"{where}: rope_type is {kind!r}; supported are {', '.join(ROPE_KEYS)}")
    more = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta", "partial_rotary_factor")}
    if kind == "llama3":
        more.setdefault("original_max_position_embeddings", c.get("max_position_embeddings"))
    if missing := [name for name in ROPE_KEYS[kind] if more.get(name) is None]:
        raise ValueError(f"{where}: rope_type is {kind!r}, but there is no {missing[0]}")
    if unknown := sorted(k for k in more if k not in ROPE_KEYS[kind] and more[k] is not None):
        raise ValueError(f"{where}: {unknown[0]} is {more[unknown[0]]!r}, which rope_type {kind!r} does not have")
    return None if kind == "default" else RopeScaling(rope_type=kind, **{name: more[name] for name in ROPE_KEYS[kind]})


def _rope_settings(config: TransformerConfig) -> Settings:
    scaling = None
    if (s := config.rope_scaling) is not None:
        scaling = dataclasses.asdict(s) if s.rope_type == "llama3" else {"rope_type": s.rope_type, "factor": s.factor}
    rope: Settings = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})}
    older: Settings = {"rope_theta": config.rope_theta, "rope_scaling": scaling}  # where older readers look
    if config.rope_local_base_freq is None:
        return {"rope_parameters": rope, **older}
    local = {"rope_theta": config.rope_local_base_freq, "rope_type": "default"}
    rope = {"full_attention": rope, "sliding_attention": local}
    return {"rope_parameters": rope, **older, "rope_local_base_freq": config.rope_local_base_freq}


# --- forms ------------------------------------------------------------------------------------------------------------


def _settings(config: TransformerConfig, kind: str) -> Settings:
    if kind not in FAMILIES:
        raise ValueError(f"model_type is {kind!r}; supported are {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    return {
        "architectures": [family.architecture],
        "model_type": kind,
        **{key: getattr(config, key) for key in (*SIZES, "head_dim", "tie_word_embeddings", "max_position_embeddings")},
        **_rope_settings(config),
        **family.form(config),
    }


def _gated(config: TransformerConfig) -> Settings:
    return {"hidden_act": config.hidden_act}


def _qwen(config: TransformerConfig) -> Settings:
    window = config.sliding_window
    layers = {"use_sliding_window": window is not None, "sliding_window": window, "layer_types": _types(config)}
    return {**_gated(config), **layers, "max_window_layers": config.num_hidden_layers}


def _qwen_mixture(config: TransformerConfig) -> Settings:
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    return {**_gated(config), **window, **{key: getattr(config, key) for key in ("num_experts", *MIXTURE)}}


def _gemma(config: TransformerConfig) -> Settings:
    scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        **{key: getattr(config, key) for key in CAPS},
        "sliding_window": config.sliding_window,
        "layer_types": _types(config),
    }


PLAIN = {"hidden_act": "silu"}
QWEN = ("use_sliding_window", "sliding_window")
GEMMA = ("hidden_activation", "hidden_act", "sliding_window", "layer_types")
GEMMA_SWITCHES = {"unit_offset_norm": True, "sandwich_norms": True, "scale_embeddings": True}
# Gemma's files leave out what the first of the family has.
GEMMA_DEFAULTS = dict(
    query_pre_attn_scalar=256, head_dim=256, tie_word_embeddings=True, rms_norm_eps=1e-6, sliding_window=4096
)

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        switches={},
        fields=("hidden_act",),
        keys=(),
        layers=_no_window,
        form=_gated,
        defaults=PLAIN | {"num_key_value_heads": None},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        switches={},
        fields=("hidden_act",),
        keys=("sliding_window",),
        layers=_one_window,
        form=lambda config: {**_gated(config), "sliding_window": config.sliding_window},
        defaults=PLAIN | {"sliding_window": 4096},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        switches={"qkv_bias": True},
        fields=("hidden_act",),
        # Its files name a bias switch only by accident: the family has biases on q, k and v, always.
        keys=(*QWEN, "max_window_layers", "layer_types", "attention_bias"),
        layers=_late_windows,
        form=_qwen,
        defaults=PLAIN,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        switches={"qk_norm": True},
        fields=("hidden_act",),
        keys=(*QWEN, "max_window_layers", "layer_types"),
        layers=_late_windows,
        form=_qwen,
        defaults=PLAIN | {"head_dim": 128},
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        switches={"qk_norm": True},
        fields=("hidden_act", *MIXTURE),
        # The balancing loss is of pretraining; the router's probabilities need no output.
        keys=(
            *QWEN,
            "num_experts",
            "num_local_experts",
            "max_window_layers",
            "output_router_logits",
            "router_aux_loss_coef",
        ),
        layers=_switched_window,
        form=_qwen_mixture,
        defaults=PLAIN | {"norm_topk_prob": False},
        fixed={"mlp_only_layers": ([], None), "decoder_sparse_step": (1,)},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        switches=GEMMA_SWITCHES,
        fields=("query_pre_attn_scalar", *CAPS),
        keys=GEMMA,
        layers=_alternating,
        form=_gemma,
        defaults=GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10_000.0},
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        switches=GEMMA_SWITCHES | {"qk_norm": True},
        fields=("query_pre_attn_scalar", *CAPS),
        keys=(*GEMMA, "rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"),
        layers=_alternating,
        form=_gemma,
        defaults=GEMMA_DEFAULTS
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1_000_000.0}
        | {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
}
