"""`models.load` and `models.save`: weights with their tokenizer, generation settings and chat template."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl_llm import models
from jaxrl_llm.models import hf
from jaxrl_llm.models.config import TransformerConfig
from jaxrl_llm.models.weights import stored
from jaxrl_llm.tasks.host import byte_pair_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
GENERATION = {"eos_token_id": [1, 7], "temperature": 0.6, "top_p": 0.95}


def config_of(vocab):
    sizes = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    return TransformerConfig(vocab_size=vocab, **sizes, num_key_value_heads=1, head_dim=4, qk_norm=True)


@pytest.fixture(scope="module")
def tokenizer():
    made = byte_pair_tokenizer(["one two three 1 2 3"], 270)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def folder(tmp_path, tokenizer):
    config = config_of(len(tokenizer) + 3)  # embeddings are often a little larger
    params: dict = {}
    rng = np.random.default_rng(0)
    for parameter in stored(config):
        node, (*parents, leaf) = params, parameter.path.split("/")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = rng.normal(size=parameter.whole).astype(np.float32)
    hf.save(tmp_path / "m", config, params, tokenizer, dtype="bfloat16", generation_config=GENERATION)
    return tmp_path / "m"


def files(folder):
    """All but what transformers notes of the way a tokenizer was read."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tokenizer_config.json"}


def edit(path, **changes):
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))


def test_everything_comes_back(folder, tokenizer, tmp_path):
    model = models.load(folder)
    assert model.config == config_of(len(tokenizer) + 3)
    assert model.dtype == "bfloat16"
    assert model.generation_config == GENERATION
    assert model.chat_template == TEMPLATE
    assert model.tokenizer.get_vocab() == tokenizer.get_vocab()
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False)
    assert text == "<user>one"
    models.save(tmp_path / "again", model, dtype=model.dtype)
    assert files(tmp_path / "again") == files(folder)
    trained = dataclasses.replace(model, params=jax.tree.map(lambda x: x + 2**-12, model.params))
    models.save(tmp_path / "again", trained)
    again = models.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again.params, trained.params)
    assert again.dtype == "float32"


def test_into_a_sharding(folder):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[3])
    model = models.load(folder, sharding=lambda path, shape: here)
    assert {x.sharding for x in jax.tree.leaves(model.params)} == {here}


def test_a_repository_is_found_in_the_hub_s_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.load("owner/tiny").generation_config == GENERATION
    assert models.load("owner/tiny", revision=commit).dtype == "bfloat16"
    with pytest.raises(
        FileNotFoundError, match="owner/other: no such folder, and no repository that can be downloaded"
    ):
        models.load("owner/other")


@pytest.mark.parametrize("name", ["nothing/at/all", "./owner/tiny", "single", "/no/folder"])
def test_what_is_neither_a_folder_nor_a_repository(name):
    with pytest.raises(FileNotFoundError, match=r"no such folder .and no name of a repository"):
        models.load(name)


def test_a_tokenizer_larger_than_the_embedding(folder, tokenizer):
    edit(folder / hf.CONFIG, vocab_size=len(tokenizer) - 1)
    words = rf"ids up to {len(tokenizer) - 1}, but model.embed_tokens.weight has {len(tokenizer) - 1} rows"
    with pytest.raises(ValueError, match=words):
        models.load(folder)


@pytest.mark.parametrize("name", ["eos_token", "pad_token"])
def test_a_missing_special_token(name, folder):
    edit(folder / "tokenizer_config.json", **{name: None})
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=rf"tokenizer_config.json: the tokenizer has no {name}; load with {name}="):
        models.load(folder)
    with pytest.raises(ValueError, match=f"does not know {name}='<nothing>'"):
        models.load(folder, **{name: "<nothing>"})
    assert getattr(models.load(folder, **{name: "3"}).tokenizer, name) == "3"


def test_one_token_for_both(folder):
    edit(folder / "tokenizer_config.json", pad_token="<eos>")
    with pytest.raises(ValueError, match=r"'<eos>' is EOS and padding.*load with pad_token="):
        models.load(folder)
    assert models.load(folder, pad_token="<pad>").tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", "{", "generation_config.json: not valid JSON"),
        ("generation_config.json", "[]", "generation_config.json: not a JSON object"),
        ("generation_config.json", '{"eos_token_id": [1, 99999]}', "eos_token_id is 99999, but the model has"),
        ("tokenizer.json", "{", "the tokenizer's files cannot be read"),
        ("tokenizer_config.json", "{", "the tokenizer's files cannot be read"),
    ],
)
def test_broken_companions(name, content, words, folder):
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=words):
        models.load(folder)


def test_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json.*hf.load reads weights alone"):
        models.load(folder)
    (folder / "generation_config.json").unlink()
    hf.load(folder)


def test_importing_models_is_cheap():
    code = (
        "import sys, jaxrl_llm.models; print([m for m in ('jax', 'transformers', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = models.nothing
