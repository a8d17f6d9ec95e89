"""Adapters as PEFT folders: what was written is read, here and by PEFT itself."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("qwix", reason="needs the extra lora")

from jaxrl_llm.models import hf, peft
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.types import Context

CONFIG = TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
)
TARGETS = ("down_proj", "k_proj", "q_proj")
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def model():
    return lora(transformer(CONFIG), rank=3, alpha=5.0, targets=TARGETS)


@pytest.fixture(scope="module")
def adapters(model):
    fresh = model.adapter.fresh(jax.random.key(0))
    return jax.tree.map(lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), fresh)


@pytest.fixture
def folder(adapters, tmp_path):
    peft.save(tmp_path / "adapters", adapters, alpha=5.0, base="some/base")
    return tmp_path / "adapters"


def test_what_was_written_is_read(folder, model, adapters):
    found = peft.load(folder)
    assert found[1:] == (3, 5.0, TARGETS)
    jax.tree.map(np.testing.assert_array_equal, found.params, adapters)
    jax.tree.map(np.testing.assert_array_equal, model.adapter.own(found.params), adapters)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapters"]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["r"] == 3 and settings["lora_alpha"] == 5.0 and settings["target_modules"] == list(TARGETS)
    assert settings["base_model_name_or_path"] == "some/base"


def test_names_and_shapes_are_pefts(folder, adapters):
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2
    np.testing.assert_array_equal(tensors[FIRST], adapters["layers"]["q_proj"]["kernel_lora_a"][0].T)
    down = tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    assert down.shape == (16, 3)
    np.testing.assert_array_equal(down, adapters["layers"]["down_proj"]["kernel_lora_b"][1].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora is True; only False"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"r": 4}, "and adapter_config.json says r=4"),
        ({"r": 0}, "r must be at least 1"),
    ],
)
def test_refuses_other_adapters(folder, changes, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        peft.load(folder)


def test_names_what_is_wrong_with_files(folder):
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    whole = path.read_bytes()
    safetensors.numpy.save_file({name: x for name, x in tensors.items() if name != FIRST}, path)
    with pytest.raises(ValueError, match="no lora_A of layer 0's q_proj"):
        peft.load(folder)
    safetensors.numpy.save_file(tensors | {FIRST.replace("q_proj", "c_attn"): tensors[FIRST]}, path)
    with pytest.raises(ValueError, match="c_attn"):
        peft.load(folder)
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        peft.load(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors: no such file"):
        peft.load(folder)
    with pytest.raises(ValueError, match=r"adapters of layers/router have no PEFT form"):
        peft.save(folder, {"layers": {"router": {"kernel_lora_a": np.zeros((2, 4, 3))}}}, alpha=1.0)


@pytest.mark.parity
def test_peft_reads_ours_and_we_read_its(folder, model, adapters, tmp_path):
    """The same logits from transformers and PEFT on the base, from us, and from transformers on the merged folder."""
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    params = transformer(CONFIG).init(jax.random.key(1))
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)
    hf.save(tmp_path / "base", CONFIG, params)
    hf.save(tmp_path / "merged", CONFIG, model.adapter.merge(params, adapters))
    tokens = np.array([[3, 1, 4, 1, 5, 9]])

    def theirs(network):
        with torch.no_grad():
            return network(torch.tensor(tokens)).logits[:, 1:].float().numpy()

    context = Context(tokens=jnp.asarray(tokens[:, :1]), mask=jnp.ones((1, 1), bool))
    inputs, attended = jnp.asarray(tokens[:, None, 1:]), jnp.ones((1, 1, 5), bool)

    @jax.jit
    def ours(params):
        return model.logits(params, model.hidden(params, context, jnp.array([1]), inputs, attended))[0]

    read = transformers.AutoModelForCausalLM.from_pretrained
    tuned = library.PeftModel.from_pretrained(read(tmp_path / "base"), folder)
    found = ours(model.adapter.join(params, adapters))
    np.testing.assert_allclose(theirs(tuned), found, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(theirs(read(tmp_path / "merged")), found, rtol=1e-4, atol=1e-4)
    assert float(np.abs(theirs(read(tmp_path / "base")) - found).max()) > 0.1
    # What PEFT makes itself, with factors of its own.
    settings = library.LoraConfig(r=3, lora_alpha=5, target_modules=list(TARGETS), init_lora_weights=False)
    other = library.get_peft_model(read(tmp_path / "base"), settings)
    other.save_pretrained(tmp_path / "theirs")
    back = peft.load(tmp_path / "theirs")
    np.testing.assert_allclose(theirs(other), ours(model.adapter.join(params, back.params)), rtol=1e-4, atol=1e-4)
