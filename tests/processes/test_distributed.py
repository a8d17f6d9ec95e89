"""Runs in two and four real processes: the same numbers, shared reading and verifying, checkpoints, and a death."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import process
import pytest

from jaxrl_llm import checkpoint, distributed, sharding

PROCESS = Path(__file__).parent / "process.py"
ROOT = PROCESS.parents[2]
HEARTBEAT = 8


def launch(n, what, folder, flags, limit=240):
    """What `n` processes of one device each print, as lines by process, their exit statuses, errors and seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": flags,
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(n),
        "HEARTBEAT": str(HEARTBEAT),
        "PYTHONPATH": str(ROOT),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, str(PROCESS), what, str(folder)]
    started = [
        subprocess.Popen(
            command,
            env=environment | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=(folder / f"errors{n}.{i}").open("w"),
            text=True,
        )
        for i in range(n)
    ]
    try:
        printed = [process.communicate(timeout=limit)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    lines = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in printed]
    errors = [(folder / f"errors{n}.{i}").read_text() for i in range(n)]
    return lines, [process.returncode for process in started], errors


def of(lines, what):
    return [line for process in lines for line in process if line["what"] == what]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(folder, fast_flags):
    return launch(2, "save,between", folder, fast_flags)


@pytest.fixture(scope="module")
def resumed(two, folder, fast_flags):
    """Two other processes go on where the first two saved."""
    return launch(2, "resume", folder, fast_flags)


@pytest.fixture(scope="module")
def four(two, folder, fast_flags):
    """They read what two processes saved, and then the second of them dies."""
    begun = time.monotonic()
    return (*launch(4, "load,kill", folder, fast_flags), time.monotonic() - begun)


@pytest.fixture(scope="module")
def alone(folder):
    """The same steps in this process, on one device."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "say", lambda **values: said.append(values))
        process.steps(sharding.data_mesh(1), "inside", folder)
    return said[0]


def test_two_and_four_processes_take_the_steps_of_one(alone, two, four):
    assert two[1] == [0, 0], two[2]
    for lines, n in ((two[0], 2), (four[0], 4)):
        assert [line["devices"] for line in of(lines, "met")] == [n] * n
        assert all(line["local"] == 1 for line in of(lines, "met"))
        assert len(of(lines, "inside")) == n
        for line in of(lines, "inside"):
            np.testing.assert_allclose(line["losses"], alone["losses"], rtol=1e-5, atol=1e-7)


def test_each_process_reads_and_verifies_its_rows_alone(alone, two, four):
    """The first batch tells the learner shapes, and everybody reads it whole."""
    assert alone["read"] == [8, 8, 8] and alone["asked"] == [64, 64]
    for lines, n in ((two[0], 2), (four[0], 4)):
        for line in of(lines, "inside"):
            assert line["read"] == [8, 8 // n, 8 // n]
            assert line["asked"] == [64 // n] * 2


def test_a_verifier_between_two_programs_is_shared_too(alone, two):
    for line in of(two[0], "between"):
        np.testing.assert_allclose(line["losses"], alone["losses"], rtol=1e-5, atol=1e-7)
        assert line["asked"] == [32] * 2


def test_two_processes_resume_to_the_last_bit(two, resumed):
    assert resumed[1] == [0, 0], resumed[2]
    want, got = of(two[0], "rest"), of(resumed[0], "rest")
    assert len(want) == len(got) == 2
    assert all(one["metrics"] == want[0]["metrics"] for one in want + got)


def test_a_checkpoint_of_two_processes_is_read_by_four_on_another_mesh(four):
    assert of(four[0], "loaded") == [{"process": 0, "what": "loaded", "same": True, "step": 2}], four[2]


def test_a_checkpoint_of_two_processes_is_read_by_one_on_another_mesh(alone, two, folder):
    mesh = sharding.mesh(data=2, fsdp=2, tensor=2)
    parts = process.parts_of(process.host_task(folder)[0], mesh)
    like = sharding.shaped(mesh, jax.eval_shape(parts.init, jax.random.key(0)))
    state = checkpoint.load(folder / "state", like)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
    assert not jax.tree.leaves(state.params)[0].is_fully_replicated and int(state.step) == 2
    saved = np.load(folder / "params.npz")
    for i, x in enumerate(jax.tree.leaves(state.params)):
        np.testing.assert_array_equal(x, saved[str(i)])


def test_the_death_of_a_process_ends_the_others_with_a_message(four):
    _, statuses, errors, seconds = four
    assert statuses[1] == -9
    for i in (0, 2, 3):
        assert statuses[i] not in (0, -9), errors[i]
        assert "another task died" in errors[i] or "heartbeat" in errors[i]
    assert seconds < 200


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "need all of JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (dict(zip(distributed.VARIABLES, ("h:1", "two", "0"), strict=True)), "the last two numbers"),
        (dict(zip(distributed.VARIABLES, ("h:1", "2", "2"), strict=True)), "must be below JAX_NUM_PROCESSES=2"),
    ],
)
def test_an_environment_that_does_not_say_where_the_others_are(monkeypatch, variables, message):
    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.start()


def test_no_others_at_all(monkeypatch):
    """JAX says that it knows no coordinator (it would refuse earlier here, where devices are in use already)."""

    def alone(**options):
        raise ValueError("coordinator_address should be defined.")

    for name in distributed.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    with pytest.raises(ValueError, match=r"coordinator_address should be defined.*set JAX_COORDINATOR_ADDRESS"):
        distributed.start()
