"""The files of a run: lines that are never lost, torn or doubled; locks; configurations that come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm import cli, folder, runs
from jaxrl_llm.folder import FolderError, Lines
from jaxrl_llm.job import TrainConfig


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_after_the_checkpoint_and_torn_ones_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}}}\n' for i in range(1, 6)) + '{"step": 6, "lo')
    with Lines(path, keep=3) as lines:
        assert steps_in(path) == [1, 2, 3]
        for i in (4, 5):
            lines.add({"step": i})
        assert steps_in(path) == [1, 2, 3]
        lines.flush(disk=True)
        assert steps_in(path) == [1, 2, 3, 4, 5]
        lines.cut(2)
        lines.add({"step": 3, "again": True})
        lines.flush()
    assert steps_in(path) == [1, 2, 3] and '"again"' in path.read_text()
    with Lines(path) as lines:
        assert path.read_bytes() == b""


@pytest.mark.parametrize("text", ['{"step": 1}\n', '{"step": 1}\n{"step": 2}', '{"step": 1}\n{"step": 3}\n', "x\n"])
def test_missing_lines_are_an_error_and_the_file_is_left_alone(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(FolderError, match=rf"{path} line \d: expected the line of step"):
        Lines(path, keep=2)
    assert path.read_text() == text


def test_lines_wait_for_room(tmp_path, no_room):
    path = tmp_path / "metrics.jsonl"
    with Lines(path) as lines:
        lines.add({"step": 1})
        lines.flush()
        with no_room(100):
            for i in (2, 3):
                lines.add({"step": i, "long": "x" * 70})
                with pytest.raises(OSError):
                    lines.flush()
                assert steps_in(path) == [1]
        lines.add({"step": 4})
        lines.flush()
    assert steps_in(path) == [1, 2, 3, 4]


def test_one_process_at_a_time_and_a_lock_ends_with_it(tmp_path):
    code = "import sys, time; from pathlib import Path; from jaxrl_llm import folder\n"
    code += "with folder.claimed(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"mine\n"
        assert folder.is_claimed(tmp_path)
        with pytest.raises(BlockingIOError, match=f"process {other.pid} on .* is training into it"):
            folder.claimed(tmp_path).__enter__()
    finally:
        other.kill()
        other.wait()
    assert not folder.is_claimed(tmp_path)
    with folder.claimed(tmp_path):
        pass


def test_configurations_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(data=Path("rows"), set={"kl": None, "group_size": 4}, bad_norm=3.0, run=Path("there"))
    found = folder.plain(config)
    (tmp_path / "config.json").write_text(json.dumps({"config": found}))
    again = folder.configured(TrainConfig, tmp_path)
    assert again.data == tmp_path / "rows" and again.run == tmp_path
    assert folder.plain(again) == found | {"run": str(tmp_path)}
    del found["bad_norm"]
    (tmp_path / "config.json").write_text(json.dumps({"config": found}))  # of a version without the option
    assert folder.configured(TrainConfig, tmp_path).bad_norm is None
    (tmp_path / "config.json").write_text(json.dumps({"config": found | {"gone": 1}}))
    with pytest.raises(ValueError, match="has no option 'gone'"):
        folder.configured(TrainConfig, tmp_path)
    for text in ("{", "[]", '{"config": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="is not a run's configuration"):
            folder.configured(TrainConfig, tmp_path)


def a_run(path, step, *, finished=False, accuracy=None):
    path.mkdir(parents=True)
    config = folder.plain(TrainConfig(run=path, steps=10))
    (path / "config.json").write_text(json.dumps({"config": config}))
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": i, "reward/mean": i / 10}) + "\n" for i in range(1, step + 1)) + '{"st'
    )
    (path / "checkpoints" / "4").mkdir(parents=True)
    (path / "checkpoints" / "6.orbax-checkpoint-tmp-7").mkdir()
    if accuracy is not None:
        folder.event(path, "evaluated", step=0, accuracy=accuracy)
    if finished:
        (path / "summary.json").write_text("{}")


def test_runs_are_listed_with_how_they_stand(tmp_path, capsys):
    a_run(tmp_path / "deep" / "done", 10, finished=True, accuracy=0.25)
    a_run(tmp_path / "halted", 5)
    a_run(tmp_path / "going", 7)
    (tmp_path / "deep" / "done" / "policy").mkdir()
    (tmp_path / "deep" / "done" / "policy" / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("[]")
    with folder.claimed(tmp_path / "going"):
        cli.main(["runs", str(tmp_path), "--json"])
    found = {row.pop("run"): row for row in json.loads(capsys.readouterr().out)}
    assert set(found) == {"deep/done", "halted", "going"}
    assert {name: row["state"] for name, row in found.items()} == {
        "deep/done": "finished", "halted": "interrupted", "going": "running"
    }  # fmt: skip
    assert found["deep/done"]["accuracy"] == 0.25 and found["halted"]["accuracy"] is None
    assert (found["halted"]["step"], found["halted"]["steps"], found["halted"]["reward"]) == (5, 10, 0.5)
    assert found["halted"]["checkpoint"] == 4 and 0 <= found["halted"]["age"] < 60

    cli.main(["runs", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "algorithm", "task", "step", "reward", "accuracy", "checkpoint", "state", "age"]
    assert any("halted" in line and "5/10" in line and "interrupted" in line for line in lines)
    cli.main(["runs", str(tmp_path / "other")])
    assert "no runs in" in capsys.readouterr().out


WRONG = {
    "resume nowhere": "no run in nowhere: it has no config.json",
    "runs nowhere": "no folder nowhere",
    "train --bad-norm 3": "--bad-norm says which updates are bad",
    "train --bad-updates skip --bad-norm 0": "--bad-norm must be a positive number",
    "train --bad-updates back --checkpoint-every 0": "needs checkpoints to go back to",
    "train --keep-checkpoints 0": "--keep-checkpoints must be at least 1",
    "train --verifier-timeout 3": "the verifier of task arithmetic is part of the step",
    "train --verifier-timeout -1": "--verifier-timeout must be a positive number",
    "resume done": "has taken all of its 10 steps",
    "resume done --steps 3": "has already taken 10 steps",
}


@pytest.mark.parametrize("line", WRONG)
def test_bad_input_is_one_clear_line(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "done", 10, finished=True)
    (tmp_path / "done" / "checkpoints" / "10").mkdir()
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert WRONG[line] in error and error.count("\n") == 1


def test_table_of_nothing():
    assert runs.table([]).split() == [
        "run",
        "algorithm",
        "task",
        "step",
        "reward",
        "accuracy",
        "checkpoint",
        "state",
        "age",
    ]
