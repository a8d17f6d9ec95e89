"""Hugging Face folders: round trips, and refusals that name what is wrong. Agreement with PyTorch: test_parity.py."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxrl_llm.models import hf
from jaxrl_llm.models.transformer import RopeScaling, TransformerConfig, transformer
from jaxrl_llm.models.weights import stored

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"
FAMILIES = tuple(sorted(path.name for path in GOLDEN.iterdir()))


def config_of(**kw):
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    return TransformerConfig(**{**sizes, "num_key_value_heads": 1, "head_dim": 4, **kw})


def random(config, seed=1):
    """Parameters that no compilation is needed for."""
    rng, params = np.random.default_rng(seed), {}
    for parameter in stored(config):
        *parents, leaf = parameter.path.split("/")
        node = functools.reduce(lambda x, name: x.setdefault(name, {}), parents, params)
        node[leaf] = rng.normal(size=parameter.whole).astype(np.float32)
    return params


def same(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b), strict=True), x, y)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_the_model_s(family):
    config, params = hf.load(GOLDEN / family)
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_we_save_is_what_transformers_saved(family, tmp_path):
    config, params = hf.load(GOLDEN / family)
    hf.save(tmp_path / "again", config, params)
    ours = safetensors.numpy.load_file(tmp_path / "again" / hf.WEIGHTS)
    theirs = safetensors.numpy.load_file(GOLDEN / family / hf.WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], strict=True)
    ours, theirs = (json.loads((f / hf.CONFIG).read_text()) for f in (tmp_path / "again", GOLDEN / family))
    if "num_experts" in ours:  # its name in published files
        theirs["num_experts"] = theirs["num_local_experts"]
    about_training = {"initializer_range", "attention_dropout", "transformers_version", "use_cache", "mlp_bias"}
    for key in ours.keys() & theirs.keys() - {"max_window_layers"}:
        assert ours[key] == theirs[key], key
    assert theirs.keys() - ours.keys() <= about_training | {
        *("attention_bias", "pretraining_tp", "output_router_logits", "router_aux_loss_coef", "mlp_only_layers"),
        *("decoder_sparse_step", "num_local_experts", "use_bidirectional_attention", "_sliding_window_pattern"),
    }
    assert hf.read_config(tmp_path / "again") == config


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_save(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = hf.load(GOLDEN / family)
    hf.save(tmp_path / "again", config, params, shard_bytes=4000)
    expected = np.load(GOLDEN / family / "expected.npz")
    rows = torch.as_tensor(np.concatenate([expected["contexts"][0], expected["responses"][0, 0]]), dtype=torch.long)

    eager = {"experts_implementation": "eager"} if config.num_experts else {}  # the other wants aligned rows

    def logits(folder):
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)
        with torch.no_grad():
            return network(rows[None]).logits.numpy()

    ours, theirs = logits(tmp_path / "again"), logits(GOLDEN / family)
    np.testing.assert_array_equal(ours, theirs)
    length = expected["contexts"].shape[1]
    np.testing.assert_allclose(theirs[0, length - 1 : -1], expected["logits"][0, 0], atol=1e-4)


GEMMA = {"unit_offset_norm": True, "sandwich_norms": True, "scale_embeddings": True, "hidden_act": "gelu_pytorch_tanh"}
ALTERNATING = {"sliding_window": 3, "layer_types": ("sliding_attention", "full_attention")}
MIXTURE = {"qk_norm": True, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 5}


@pytest.mark.parametrize(
    "kw",
    [
        {"rope_scaling": RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=64)},
        {"rope_scaling": RopeScaling(rope_type="linear", factor=2.5), "sliding_window": 3},
        {"qkv_bias": True, **ALTERNATING},
        {"qk_norm": True, "tie_word_embeddings": False, "head_dim": 6},
        {**MIXTURE, "norm_topk_prob": False},
        {**GEMMA, **ALTERNATING, "attn_logit_softcapping": 7.0, "query_pre_attn_scalar": 9},
        {**GEMMA, **ALTERNATING, "qk_norm": True, "rope_local_base_freq": 10.0, "final_logit_softcapping": 2.5},
    ],
)
def test_round_trip_is_bit_exact(kw, tmp_path):
    config = config_of(rope_theta=1234.5, rms_norm_eps=1e-5, **kw)
    params = random(config)
    hf.save(tmp_path / "m", config, params)
    config_again, again = hf.load(tmp_path / "m")
    assert config_again == config
    same(again, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"], "temporary files were left behind"


def write(folder, change_config=lambda c: c, change_tensors=lambda t: t):
    config = config_of()
    hf.save(folder, config, random(config))
    settings = json.loads((folder / hf.CONFIG).read_text())
    (folder / hf.CONFIG).write_text(json.dumps(change_config(settings)))
    tensors = safetensors.numpy.load_file(folder / hf.WEIGHTS)
    safetensors.numpy.save_file(change_tensors(tensors), folder / hf.WEIGHTS)
    return tensors


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_read_to_float32(dtype, tmp_path):
    tensors = write(tmp_path / "m", change_tensors=lambda t: {k: x.astype(dtype) for k, x in t.items()})
    config, params = hf.load(tmp_path / "m", dtype=jnp.bfloat16)
    assert config.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    wanted = tensors["model.embed_tokens.weight"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(params["embed"], wanted)


def shard(folder, tensors):
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.numpy.save_file({n: tensors[n] for n in part}, folder / file)
    (folder / hf.WEIGHTS).unlink()
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {n: f for f, part in parts.items() for n in part}}))


def test_shards(tmp_path):
    tensors = write(tmp_path / "m")
    whole = hf.load(tmp_path / "m")[1]
    shard(tmp_path / "m", tensors)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "m")[1], whole)
    (tmp_path / "m" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors.*index"):
        hf.load(tmp_path / "m")


def test_saving_over_shards_leaves_no_stale_index(tmp_path):
    shard(tmp_path / "m", write(tmp_path / "m"))
    config = config_of()
    params = random(config, 7)
    hf.save(tmp_path / "m", config, params)
    assert not (tmp_path / "m" / hf.INDEX).exists()
    np.testing.assert_array_equal(hf.load(tmp_path / "m")[1]["embed"], np.asarray(params["embed"]))


def test_a_failed_save_leaves_the_old_folder_alone(tmp_path):
    write(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    params = random(config_of(), 7)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / "m", config_of(), params, tokenizer=Broken())
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type is 'linear', but there is no factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, "mscale is 0.7"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"use_sliding_window": True}, "use_sliding_window is True, which is unknown here and may change"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0.*ignore=.'clip_qkv',."),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"layer_types": ["full_attention", "chunked_attention"], "model_type": "qwen3"}, "has 'chunked_attention'"),
        ({"layer_types": ["full_attention"], "model_type": "qwen3"}, "layer_types names 1 layers of 2"),
        ({"layer_types": ["sliding_attention"] * 2, "model_type": "qwen3"}, "need a sliding_window"),
        ({"model_type": "qwen3_moe"}, "no 'num_experts_per_tok'"),
        ({"model_type": "qwen3_moe", **EXPERTS, "mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]"),
        ({"model_type": "qwen3_moe", **EXPERTS, "decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"model_type": "gemma2", "hidden_activation": "relu", "hidden_act": "relu"}, "hidden_act is 'relu'"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": {"rope_type": "yarn"}}},
            "sliding_attention.rope_type is 'yarn'",
        ),
        ({"model_type": "gemma3"}, "model_type is 'gemma3'"),  # without a text_config
        ({"num_attention_heads": None}, "num_attention_heads is None, not a positive number"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": None, "rope_theta": None}, "no rope_theta"),
        ({"rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_configurations_we_do_not_compute_are_refused(change, words, tmp_path):
    write(tmp_path / "m", change_config=lambda c: {**c, **change})
    with pytest.raises(ValueError, match=words) as error:
        hf.load(tmp_path / "m")
    assert hf.CONFIG in str(error.value)


def test_the_text_model_of_one_that_sees_images(tmp_path):
    """The names are those that transformers 5.23 writes for Gemma3ForConditionalGeneration, and of published files."""
    config, params = hf.load(GOLDEN / "gemma3_text")
    folder = tmp_path / "m"
    hf.save(folder, config, params, shard_bytes=4000)
    index, saw = json.loads((folder / hf.INDEX).read_text()), "vision_tower.post_layernorm.bias"
    for file in sorted(set(index["weight_map"].values())):
        tensors = {f"language_model.{k}": x for k, x in safetensors.numpy.load_file(folder / file).items()}
        safetensors.numpy.save_file({**tensors, saw: np.ones(3, np.float32)}, folder / file)
    names = {f"language_model.{k}": file for k, file in index["weight_map"].items()}
    (folder / hf.INDEX).write_text(json.dumps({"weight_map": {**names, saw: file}}))
    text = json.loads((folder / hf.CONFIG).read_text())
    text.pop("tie_word_embeddings")
    whole = {"model_type": "gemma3", "text_config": text, "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4}
    (folder / hf.CONFIG).write_text(json.dumps(whole))
    again, loaded = hf.load(folder)
    assert again == config
    same(loaded, params)
    hf.save(tmp_path / "text", again, loaded)
    assert json.loads((tmp_path / "text" / hf.CONFIG).read_text())["model_type"] == "gemma3_text"


def test_older_and_newer_spellings_of_rope(tmp_path):
    write(tmp_path / "m", change_config=lambda c: {**c, "rope_theta": 5.0, "rope_parameters": None})
    assert hf.load(tmp_path / "m")[0].rope_theta == 5.0
    write(tmp_path / "n", change_config=lambda c: {**c, "rope_theta": 1.0, "rope_parameters": {"rope_theta": 6.0}})
    assert hf.load(tmp_path / "n")[0].rope_theta == 6.0


def test_broken_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        hf.load(tmp_path / "nothing")
    name = "model.layers.1.mlp.up_proj.weight"

    write(tmp_path / "a", change_tensors=lambda t: {k: x for k, x in t.items() if k != name})
    with pytest.raises(ValueError, match=f"no tensor '{name}'"):
        hf.load(tmp_path / "a")

    write(tmp_path / "b", change_tensors=lambda t: {**t, name: t[name].T.copy()})
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor '{name}' has shape \(8, 12\).*\(12, 8\)"):
        hf.load(tmp_path / "b")

    write(tmp_path / "c")
    path = tmp_path / "c" / hf.WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        hf.load(tmp_path / "c")

    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        hf.load(tmp_path / "c")

    shutil.copytree(tmp_path / "a", tmp_path / "d")
    (tmp_path / "d" / hf.CONFIG).write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        hf.load(tmp_path / "d")


def test_save_refuses_what_no_family_has(tmp_path):
    config = config_of(qkv_bias=True, qk_norm=True)
    with pytest.raises(ValueError, match="combination: qkv_bias, qk_norm"):
        hf.save(tmp_path / "m", config, {})
    config = config_of()
    params = random(config)
    with pytest.raises(ValueError, match=r"params\['embed'\] has shape \(11, 8\)"):
        hf.save(tmp_path / "m", config_of(vocab_size=12), params)
    assert list(tmp_path.iterdir()) == []
