"""The launchers end in `jaxrl-llm train`, with every argument as it was given."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from jaxrl_llm.cli import parse

SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("launch_*.sh"))
# What a shell could take apart: a space, a quote, a dollar sign.
ARGUMENTS = ["--run", "/shared/it's a $run", "--task", "sorting", "--set", "group_size=4", "kl=none"]


@pytest.fixture
def launched(tmp_path):
    """What `gcloud` or `srun` is called with."""
    for name in ("gcloud", "srun"):
        stub = tmp_path / name
        stub.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "${0##*/}" "$@"\n')
        stub.chmod(0o755)

    def run(name, *arguments, **environment):
        script = next(path for path in SCRIPTS if path.name == name)
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
        return subprocess.run([script, *arguments], env=env, capture_output=True, text=True, check=False)

    return run


def words(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.split("\0")[:-1]


def checked(command, mesh, distributed):
    assert command[:2] == ["jaxrl-llm", "train"]
    config = parse(command[1:])
    assert (config.mesh, config.distributed) == (mesh, distributed)
    assert str(config.run) == "/shared/it's a $run" and config.set == {"group_size": 4, "kl": None}


def test_tpu_vm(launched):
    found = words(launched("launch_tpu_vm.sh", "vm", "us-east5-b", *ARGUMENTS, MESH="data=2,fsdp=-1"))
    assert found[:-1] == ["gcloud", *shlex.split("compute tpus tpu-vm ssh vm --zone us-east5-b --command")]
    checked(shlex.split(found[-1]), "data=2,fsdp=-1", False)


def test_tpu_pod(launched):
    found = words(launched("launch_tpu_pod.sh", "slice", "us-east5-b", *ARGUMENTS))
    assert found[:-1] == [
        "gcloud",
        *shlex.split("compute tpus tpu-vm ssh slice --zone us-east5-b --worker=all --command"),
    ]
    checked(shlex.split(found[-1]), "fsdp=-1", True)


def test_slurm(launched):
    found = words(launched("launch_slurm.sh", *ARGUMENTS, MESH="fsdp=8,tensor=2"))
    assert found[:2] == ["srun", "--kill-on-bad-exit=1"]
    checked(found[2:], "fsdp=8,tensor=2", True)


@pytest.mark.parametrize("name", ["launch_tpu_vm.sh", "launch_tpu_pod.sh"])
def test_what_is_missing_is_named(launched, name):
    result = launched(name, "vm")
    assert result.returncode != 0 and "its zone" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", *map(str, SCRIPTS)], check=True)
