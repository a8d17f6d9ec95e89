"""Adapters from the command line to the folders a run leaves."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("qwix", reason="needs the extra lora")

from jaxrl_llm import cli, tasks
from jaxrl_llm.execute import execute
from jaxrl_llm.job import prepare, resumable
from jaxrl_llm.models import hf, peft
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.transformer import TransformerConfig, transformer


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    tokenizer = tasks.load("sorting").tokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 32, "head_dim": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = TransformerConfig(vocab_size=len(tokenizer), **sizes, **heads)
    folder = tmp_path_factory.mktemp("lora") / "policy"
    hf.save(folder, config, jax.device_get(transformer(config).init(jax.random.key(0))), tokenizer=tokenizer)
    return folder


def command(policy, run, *more):
    line = f"train --task sorting --policy {policy} --run {run} --steps 1 --prompts-per-step 2 --eval-problems 2 "
    line += "--learning-rate 0.1 --set group_size=4 --lora-rank 2 --lora-targets q_proj down_proj"
    return cli.parse([*line.split(), *more])


def test_leaves_a_merged_policy_and_adapters(policy, tmp_path):
    """And goes on from its checkpoint."""
    run = tmp_path / "run"
    execute(prepare(command(policy, run, "--quantize", "int8")))
    execute(prepare(resumable(run, 3), resumed=True))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3
    found = peft.load(run / "adapters")
    assert found[1:] == (2, 4.0, ("down_proj", "q_proj"))
    settings = json.loads((run / "adapters" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(policy)
    config, base = hf.load(policy)
    model = lora(transformer(config), rank=2, alpha=4.0, targets=found.targets, quantize="int8")
    merged = model.adapter.merge(model.adapter.base(base), found.params)
    _, saved = hf.load(run / "policy")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), saved, merged)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-targets", "q_proj", "nothing"], "--lora-targets.* do not fit the policy: no target 'nothing'"),
        (["--quantize", "nf4"], "block_size 64 must divide"),
        (["--lora-rank", "0"], "rank must be at least 1"),
    ],
)
def test_refuses_in_words(policy, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(command(policy, tmp_path / "run", *options))


@pytest.mark.parametrize("option", ["--lora-alpha 0", "--lora-targets q_proj", "--quantize int8", "--quantize-block 8"])
def test_refuses_options_of_adapters_without_a_rank(tmp_path, option):
    with pytest.raises(ValueError, match=f"{option.split()[0]} is of adapters: say their rank, --lora-rank N"):
        prepare(cli.parse(["train", "--run", str(tmp_path / "run"), *option.split()]))
