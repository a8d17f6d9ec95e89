"""Real processes: killed at a moment nobody chose, and resumed, a run is to the last bit what it would have been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxrl_llm.models import hf
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.tasks.host import byte_pair_tokenizer

STEPS = 60


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """`command(run)` trains on rows of a file; programs are compiled once."""
    folder = tmp_path_factory.mktemp("killed")
    sizes = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    config = TransformerConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    params = jax.device_get(transformer(config).init(jax.random.key(0)))
    hf.save(folder / "policy", config, params, tokenizer=byte_pair_tokenizer(["0 1 2"], 258))
    rows = [json.dumps({"prompt": f"number {i}", "answer": i % 3}) for i in range(37)]
    (folder / "data.jsonl").write_text("\n".join(rows))
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"XLA_FLAGS": fast, "JAX_PLATFORMS": "cpu"}

    def start(run, verb="train"):
        line = [sys.executable, "-m", "jaxrl_llm.cli", verb]
        if verb == "train":
            options = "--task jsonl --task-options response_length=8 prompt_length=12 --set group_size=8 kl=none"
            options += f" --steps {STEPS} --checkpoint-every 7 --eval-problems 2 --learning-rate 1e-3"
            options += " --prompts-per-step 3"
            paths = ["--policy", str(folder / "policy"), "--data", str(folder / "data.jsonl"), "--run", str(run)]
            line += [*options.split(), *paths]
        else:
            line += [str(run)]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def lines(run: Path):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def count(run: Path):
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def after(process, run, steps):
    """Waits for as many lines."""
    while count(run) < steps:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_killed_and_resumed_is_the_undisturbed_run(command, tmp_path):
    undisturbed = command(tmp_path / "whole")
    _, error = undisturbed.communicate()
    assert undisturbed.returncode == 0, error
    assert any(line["reward/mean"] > 0 for line in lines(tmp_path / "whole"))

    run = tmp_path / "run"
    killed = command(run)
    after(killed, run, 11)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert 11 <= count(run) < STEPS

    resumed = command(run, "resume")
    _, error = resumed.communicate()
    assert resumed.returncode == 0, error
    assert lines(run) == lines(tmp_path / "whole")
    states = [ocp.load(path / "checkpoints" / str(STEPS)) for path in (run, tmp_path / "whole")]
    assert states[0].keys() == states[1].keys() and len(states[0]) > 20
    for name in states[0]:
        a, b = (jax.random.key_data(s[name]) if name == ".key" else np.asarray(s[name]) for s in states)
        np.testing.assert_array_equal(a, b, err_msg=name)
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, tmp_path / "whole")]
    for summary in summaries:
        del summary["train_seconds"]
    assert summaries[0] == summaries[1]
