"""Weights in files: into shardings slice by slice, in shards, in other types, whole or not at all; what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.models import hf, weights
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.weights import stored

SIZES = dict(vocab_size=12, hidden_size=8, intermediate_size=16, num_hidden_layers=3, num_attention_heads=4)
DENSE = TransformerConfig(**SIZES, num_key_value_heads=2, head_dim=4, qkv_bias=True, tie_word_embeddings=False)
MIXTURE = TransformerConfig(
    **SIZES,
    num_key_value_heads=2,
    head_dim=4,
    qk_norm=True,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
)


def random(config, seed=0):
    rng, params = np.random.default_rng(seed), {}
    for parameter in stored(config):
        node, (*parents, leaf) = params, parameter.path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = rng.normal(size=parameter.whole).astype(np.float32)
    return params


def same(x, y):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), x, y)


def spread(mesh, shape):
    """Each axis over the next axis of the mesh that divides it."""
    free, spec = list(mesh.shape.items()), []
    for n in shape:
        fits = [name for name, size in free if n % size == 0]
        spec.append(fits[0] if fits else None)
        free = [(name, size) for name, size in free if name not in fits[:1]]
    return NamedSharding(mesh, PartitionSpec(*spec))


# --- shardings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DENSE, MIXTURE])
@pytest.mark.parametrize("named", [False, True])
def test_every_device_s_slice_is_read_by_itself(config, named, tmp_path, monkeypatch):
    params = random(config)
    hf.save(tmp_path / "m", config, params, shard_bytes=1000)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("x", "y"))
    wanted = {p.path: spread(mesh, p.whole) for p in stored(config)}
    read, sizes = weights.Folder.read, {}

    def counted(self, parameter, index):
        piece = read(self, parameter, index)
        sizes.setdefault(parameter.path, []).append(piece.size)
        return piece

    monkeypatch.setattr(weights.Folder, "read", counted)
    _, loaded = hf.load(tmp_path / "m", sharding=wanted if named else lambda path, shape: wanted[path])
    same(loaded, params)
    for parameter in stored(config):
        leaf = loaded
        for name in parameter.path.split("/"):
            leaf = leaf[name]
        assert leaf.sharding.is_equivalent_to(wanted[parameter.path], leaf.ndim)
        shard = np.prod(wanted[parameter.path].shard_shape(parameter.whole))
        assert set(sizes[parameter.path]) == {shard}
        assert sum(sizes[parameter.path]) == np.prod(parameter.whole), "a slice was read twice"
    assert max(len(x) for x in sizes.values()) == 8


def test_a_mapping_of_shardings_must_fit(tmp_path):
    hf.save(tmp_path / "m", DENSE, random(DENSE))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    every = {p.path: here for p in stored(DENSE)}
    with pytest.raises(ValueError, match="sharding has no 'layers/q_proj/kernel'"):
        hf.load(tmp_path / "m", sharding={k: v for k, v in every.items() if k != "layers/q_proj/kernel"})
    with pytest.raises(ValueError, match="sharding names 'layers/router/kernel', which this model does not have"):
        hf.load(tmp_path / "m", sharding={**every, "layers/router/kernel": here})


# --- types and shards -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [10**9, 1500, 1])
@pytest.mark.parametrize("config", [DENSE, MIXTURE])
def test_saving_in_shards(config, limit, tmp_path):
    params = random(config)
    hf.save(tmp_path / "m", config, jax.tree.map(jax.numpy.asarray, params), shard_bytes=limit)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    tensors = [safetensors.numpy.load_file(file) for file in files]
    for file in tensors:
        assert len(file) == 1 or sum(x.nbytes for x in file.values()) <= limit
    if limit == 10**9:
        assert [file.name for file in files] == [hf.WEIGHTS]
    else:
        index = json.loads((tmp_path / "m" / hf.INDEX).read_text())
        assert index["weight_map"] == {k: f.name for f, x in zip(files, tensors, strict=True) for k in x}
        assert index["metadata"]["total_size"] == sum(x.nbytes for file in tensors for x in file.values())
        assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
        assert (limit == 1) == (len(files) == len(index["weight_map"]))
    again, loaded = hf.load(tmp_path / "m")
    assert again == config
    same(loaded, params)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files_come_back_to_the_bit(dtype, tmp_path):
    hf.save(tmp_path / "half", DENSE, random(DENSE), dtype=dtype)
    config, params, found = hf.load_all(tmp_path / "half", dtype=np.float32, sharding=None, ignore=())
    assert found == dtype
    assert json.loads((tmp_path / "half" / hf.CONFIG).read_text())["dtype"] == dtype
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    hf.save(tmp_path / "again", config, params, dtype=found)
    assert (tmp_path / "again" / hf.WEIGHTS).read_bytes() == (tmp_path / "half" / hf.WEIGHTS).read_bytes()


def test_files_of_several_types_are_saved_in_the_widest(tmp_path):
    write(tmp_path / "m", lambda t: {k: x.astype(ml_dtypes.bfloat16) if "proj" in k else x for k, x in t.items()})
    assert hf.load_all(tmp_path / "m", dtype=np.float32, sharding=None, ignore=())[2] == "float32"


def test_other_types_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="dtype is int8; weights are saved as float32, bfloat16 or float16"):
        hf.save(tmp_path / "m", DENSE, random(DENSE), dtype=np.int8)


# --- whole or not at all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [1500, 10**9])
@pytest.mark.parametrize("after", [1500, 10**9])
def test_a_save_that_is_cut_off_anywhere_leaves_whole_weights(before, after, tmp_path, monkeypatch):
    old, new, steps = random(DENSE, 1), random(DENSE, 2), []
    replace, unlink = os.replace, Path.unlink

    def dying(real, *args, **kw):
        steps[-1] -= 1
        if steps[-1] < 0:
            raise KeyboardInterrupt
        return real(*args, **kw)

    outcomes = []
    for n in range(100):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        hf.save(tmp_path / "m", DENSE, old, shard_bytes=before)
        (tmp_path / "m" / "model-of-mine.safetensors").write_text("not of this model")
        with monkeypatch.context() as patch:
            steps.append(n)
            patch.setattr(os, "replace", lambda *args: dying(replace, *args))
            patch.setattr(Path, "unlink", lambda *args, **kw: dying(unlink, *args, **kw))
            try:
                hf.save(tmp_path / "m", DENSE, new, shard_bytes=after)
            except KeyboardInterrupt:
                ended = False
            else:
                ended = True
        loaded = hf.load(tmp_path / "m")[1]
        outcomes.append(bool((loaded["embed"] == new["embed"]).all()))
        same(loaded, new if outcomes[-1] else old)
        if ended:
            break
    assert outcomes[0] is False
    assert outcomes == sorted(outcomes), "weights went back"
    assert outcomes[-1] is True
    names = {path.name for path in (tmp_path / "m").glob("*.safetensors")} - {"model-of-mine.safetensors"}
    index = tmp_path / "m" / hf.INDEX
    used = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {hf.WEIGHTS}
    assert names == used, "shards of the old model were left behind"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def write(folder, change=lambda t: t, shards=False):
    hf.save(folder, DENSE, random(DENSE), shard_bytes=2000 if shards else 10**9)
    if not shards:
        path = folder / hf.WEIGHTS
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)
    return sorted(folder.glob("*.safetensors"))


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: {k: x for k, x in t.items() if k != Q}, f"no tensor '{Q}'; config.json says"),
        (
            lambda t: {**t, Q: t[Q][:-1].copy()},
            rf"safetensors: tensor '{Q}' has shape \(15, 8\), .* asks for \(16, 8\)",
        ),
        (lambda t: {**t, Q: t[Q].astype(np.int8)}, f"safetensors: tensor '{Q}' has type I8; .* quantised"),
        (lambda t: {**t, "model.layers.3.mlp.up_proj.weight": t[Q]}, "'model.layers.3.mlp.up_proj.weight' belongs to"),
        (lambda t: {**t, Q.replace("weight", "scales"): t[Q]}, "q_proj.scales' belongs to nothing"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, words, tmp_path):
    write(tmp_path / "m", change)
    with pytest.raises(ValueError, match=words):
        hf.load(tmp_path / "m")


def test_a_tensor_known_to_change_nothing_can_be_left_out(tmp_path):
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32),
        "value_head": np.ones(1, np.float32),
    }
    write(tmp_path / "m", lambda t: {**t, **extra})
    with pytest.raises(ValueError, match=r"'value_head' belongs to nothing .*ignore=\('value_head',\)"):
        hf.load(tmp_path / "m")
    same(hf.load(tmp_path / "m", ignore=("value_head",))[1], random(DENSE))


def test_broken_shards_are_named(tmp_path):
    second = write(tmp_path / "m", shards=True)[1]
    whole = second.read_bytes()
    for bad in (whole[:-3], whole[:20], b"", b"\xff" * 40):
        second.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"{second.name}: not a whole safetensors file"):
            hf.load(tmp_path / "m")
    tensors = safetensors.numpy.load(whole)
    missing = min(tensors)
    safetensors.numpy.save_file({k: x for k, x in tensors.items() if k != missing}, second)
    with pytest.raises(ValueError, match=rf"{second.name}: cannot read tensor '{missing}'"):
        hf.load(tmp_path / "m")
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{second.name}: no such file, but .*index.json names it"):
        hf.load(tmp_path / "m")
    for bad in ("{", "[]", '{"weight_map": 3}'):
        (tmp_path / "m" / hf.INDEX).write_text(bad)
        with pytest.raises(ValueError, match=r"index\.json: not a JSON object with a 'weight_map'"):
            hf.load(tmp_path / "m")
