"""Hugging Face folders: agreement with PyTorch, round trips, and refusals that name what is wrong."""

from __future__ import annotations

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
from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.types import Context

GOLDEN = Path(__file__).parent.parent / "golden" / "hf"
FAMILIES = ("llama", "qwen2", "qwen3")
S = 6  # of the golden rows' 17 tokens, those that serve as context


def config_of(**kw):
    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    return TransformerConfig(**{**sizes, "num_key_value_heads": 1, "head_dim": 4, **kw})


def golden(family):
    config, params = hf.load(GOLDEN / family)
    expected = np.load(GOLDEN / family / "expected.npz")
    tokens = jnp.asarray(expected["tokens"])
    context = Context(tokens=tokens[:, :S], mask=jnp.ones((3, S), bool))
    responses = tokens[:, None, S:]
    prefix, offset, last = prefix_of(context)
    attended = jnp.ones_like(responses, bool)
    inputs = inputs_of(last, responses, attended)
    # Output t predicts token S + t, which PyTorch's position S + t - 1 does.
    return transformer(config), params, prefix, offset, inputs, attended, expected["logits"][:, S - 1 : -1]


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_transformers(family):
    model, params, prefix, offset, inputs, attended, expected = golden(family)
    logits = model.logits(params, model.hidden(params, prefix, offset, inputs, attended))[:, 0]
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_equals_transformers(family):
    model, params, prefix, offset, inputs, _, expected = golden(family)
    params = jax.tree.map(jnp.asarray, params)
    decoder, cache, steps = model.decoder(params), model.empty(3, 1, inputs.shape[-1]), []
    kept = model.prefill(params, prefix)
    for t in range(inputs.shape[-1]):
        hidden, cache = model.decode(decoder, kept, prefix.mask, cache, offset, inputs[..., t], jnp.asarray(t))
        steps.append(model.logits(params, hidden)[:, 0])
    np.testing.assert_allclose(np.stack(steps, 1), expected, atol=1e-4)


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
    same = (*hf.SIZES, "model_type", "architectures", "rope_parameters", "tie_word_embeddings")
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_what_we_save(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = hf.load(GOLDEN / family)
    hf.save(tmp_path / "again", config, params)
    network = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    expected = np.load(GOLDEN / family / "expected.npz")
    with torch.no_grad():
        logits = network(torch.as_tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("kw", [{}, {"qkv_bias": True}, {"qk_norm": True, "tie_word_embeddings": False, "head_dim": 6}])
def test_round_trip_is_bit_exact(kw, tmp_path):
    config = config_of(rope_theta=1234.5, rms_norm_eps=1e-5, **kw)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    shapes = jax.eval_shape(transformer(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), shapes)
    hf.save(tmp_path / "m", config, params)
    config_again, again = hf.load(tmp_path / "m")
    assert config_again == config
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y), strict=True), again, params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"], "temporary files were left behind"


def write(folder, change_config=lambda c: c, change_tensors=lambda t: t):
    config = config_of()
    hf.save(folder, config, transformer(config).init(jax.random.key(0)))
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
    params = transformer(config).init(jax.random.key(7))
    hf.save(tmp_path / "m", config, params)
    assert not (tmp_path / "m" / hf.INDEX).exists()
    np.testing.assert_array_equal(hf.load(tmp_path / "m")[1]["embed"], np.asarray(params["embed"]))


def test_a_failed_save_leaves_the_old_folder_alone(tmp_path):
    write(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()}
    params = transformer(config_of()).init(jax.random.key(7))

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hf.save(tmp_path / "m", config_of(), params, tokenizer=Broken())
    assert {p.name: p.read_bytes() for p in (tmp_path / "m").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
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
    with pytest.raises(ValueError, match="both qkv_bias and qk_norm"):
        hf.save(tmp_path / "m", config, {})
    config = config_of()
    params = transformer(config).init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"params\['embed'\] has shape \(11, 8\)"):
        hf.save(tmp_path / "m", config_of(vocab_size=12), params)
    assert list(tmp_path.iterdir()) == []
