"""A run that is ended, resumed, short of room or given bad updates, in one process; see test_resume for real kills."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxrl_llm import algorithms, checkpoint, cli, execute, folder, job, watch
from jaxrl_llm.checkpoint import Checkpoints
from jaxrl_llm.engine import learner
from jaxrl_llm.evaluate import Evaluation
from jaxrl_llm.job import Job, TrainConfig
from jaxrl_llm.models.transformer import TransformerConfig
from jaxrl_llm.policy import language_model
from jaxrl_llm.types import Learner
from jaxrl_llm.updates.optimizer import adamw

STEPS = 12


@pytest.fixture(scope="module")
def parts(fault_runs):
    """`parts(job, size)`: a learner of a few numbers, some of whose gradients are of that size."""
    made = {}

    def of(job, size=None):
        how = size, job.config.bad_updates == "apply"
        if how not in made:
            made[how] = fault_runs.numbers(job, size=size)
        return made[how]

    return of


def evaluation(params):
    norm = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(params)))
    return Evaluation(norm, norm, 1.0, 1, [{"prompt": "p", "response": "r", "reward": float("nan")}])


class Stop(Exception):
    """What ends a process here; what follows it never runs."""


@pytest.fixture(scope="module")
def starter(parts, letters):
    return functools.partial(starts, parts, letters)


@pytest.fixture
def start(starter, monkeypatch, tmp_path):
    return starter(monkeypatch, tmp_path)


def starts(parts, letters, monkeypatch, tmp_path):
    """`start(name, size=None, at={step: function}, **options)` executes a job; the functions are called after steps."""
    monkeypatch.setattr(execute, "evaluator", lambda *_, **__: evaluation)
    monkeypatch.setattr(execute.hf, "save", lambda *_, **__: None)
    monkeypatch.setattr(execute.report, "curve", lambda _: None)

    def run(name="run", *, size=None, at=None, resumed=False, **options):
        config = TrainConfig(run=tmp_path / name, **({"steps": STEPS, "checkpoint_every": 3} | options))
        config = job.resumable(tmp_path / name, options.get("steps")) if resumed else config
        add_lines = watch.Watch._add_lines

        def then(self, values):
            add_lines(self, values)
            (at or {}).get(self.record.step, lambda: None)()

        made = a_job(config, letters, resumed)
        with monkeypatch.context() as patch:
            patch.setattr(execute, "learner_of", functools.partial(parts, size=size))
            patch.setattr(watch.Watch, "_add_lines", then)
            return execute.execute(made)

    return run


def a_job(config, task, resumed=False):
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "head_dim": 8}
    model = TransformerConfig(**sizes, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    recipe = algorithms.load("grpo")
    return Job(
        config=config, algorithm=recipe, task=task, model=model, params=None, tokenizer=task.tokenizer, resumed=resumed
    )


def lines(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def state_of(path, step=STEPS):
    return ocp.load(path / "checkpoints" / str(step))


def same(a, b):
    for (place, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(place))


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def crash():
    raise Stop


def kinds(path):
    return [event["event"] for event in folder.events(path)]


@pytest.fixture(scope="module")
def whole(starter, tmp_path_factory):
    """A run nobody disturbs: summary, lines, last state."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        summary = starter(patch, folder)("whole", eval_every=4)
    return summary, lines(folder / "whole"), state_of(folder / "whole"), folder / "whole"


def test_ended_and_resumed_is_the_undisturbed_run(whole, start, tmp_path):
    """Told to end after step 2, crashed after 7 (back to 6), told to end after 8 where an evaluation is due."""
    path = tmp_path / "run"
    with pytest.raises(watch.Preempted) as ended:
        start(eval_every=4, at={2: terminate})
    assert ended.value.step == 2 and len(lines(path)) == 2
    with pytest.raises(Stop):
        start(resumed=True, at={7: crash})
    assert len(lines(path)) == 7 and checkpoint.Checkpoints(path / "checkpoints").steps() == [3, 6]
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "seconds": 1.0}\n{"step": 8, "se')  # what a process that is killed may leave
    with pytest.raises(watch.Preempted) as ended:
        start(resumed=True, at={8: terminate})
    assert ended.value.step == 8 and not (path / "summary.json").exists()
    summary = start(resumed=True)

    assert lines(path) == whole[1]
    same(state_of(path), whole[2])
    assert summary | {"train_seconds": 0} == whole[0] | {"train_seconds": 0}
    assert list(summary["evaluations"]) == ["0", "4", "8", "12"]
    assert kinds(path).count("resumed") == 3 and kinds(path).count("preempted") == 2
    assert json.loads((path / "transcripts.json").read_text())["before"][0]["reward"] is None


def test_the_command_line_says_how_to_go_on(start, tmp_path, monkeypatch, capsys):
    def prepared(error):
        monkeypatch.setattr(cli, "execute", lambda _: (_ for _ in ()).throw(error))
        return dataclasses.make_dataclass("Job", ["config"])(TrainConfig(run=tmp_path / "a run"))

    assert cli.attempt(prepared(watch.Preempted(7))) is None, "exit status 0"
    again = f"jaxrl-llm resume '{tmp_path}/a run'"
    assert f"its checkpoint is of step 7; {again} goes on" in capsys.readouterr().err
    for error, status in ((KeyboardInterrupt(), 130), (watch.BadUpdate("bad"), 1), (checkpoint.SaveError("full"), 1)):
        with pytest.raises(SystemExit) as stop:
            cli.attempt(prepared(error))
        assert stop.value.code == status
        assert again in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_longer_run_goes_on_as_if_it_had_been_asked_for_at_once(whole, start, tmp_path):
    start(steps=5)
    start(resumed=True, steps=STEPS)
    assert lines(tmp_path / "run") == whole[1]
    same(state_of(tmp_path / "run"), whole[2])
    with pytest.raises(ValueError, match="has taken all of its 12 steps"):
        start(resumed=True)


def test_without_any_checkpoint_it_begins_again(whole, start, tmp_path):
    with pytest.raises(Stop):
        start(at={2: crash})
    start(resumed=True)
    assert lines(tmp_path / "run") == whole[1]


def test_what_the_checkpoint_says_of_the_run(whole):
    beside = ocp.metadata(whole[3] / "checkpoints" / str(STEPS)).custom_metadata
    assert (beside["step"], beside["cursor"], beside["returns"]) == (STEPS, STEPS, 0)
    assert beside["config"] == json.loads((whole[3] / "config.json").read_text())["config"]
    assert beside["versions"]["jax"] == jax.__version__ and beside["devices"]
    assert set(beside["evaluations"]) == {"0", "4", "8"}


def test_bad_updates_are_left_out_or_end_the_run(start, tmp_path, capsys):
    start("skip", size="NaN", seed=2, bad_updates="skip")
    found = lines(tmp_path / "skip")
    bad = [line["step"] for line in found if line["skipped"]]
    assert bad == [line["step"] for line in found if line["grad_norm"] is None] and 0 < len(bad) < STEPS / 2
    state = state_of(tmp_path / "skip")
    assert int(state[".memory['guard']['skipped']"]) == len(bad) == found[-1]["skipped/total"]
    assert all(np.isfinite(x).all() for name, x in state.items() if name.startswith(".params"))
    said = capsys.readouterr().out
    assert f"step {bad[0]}: a bad update" in said and "grad_norm not finite" in said

    with pytest.raises(watch.BadUpdate, match=f"the update of step {bad[0]} was bad"):
        start("stop", size="NaN", seed=2, bad_updates="stop")
    assert lines(tmp_path / "stop") == found[: bad[0]]
    kept = state_of(tmp_path / "stop", bad[0])
    assert all(np.isfinite(x).all() for name, x in kept.items() if name.startswith(".params"))


def test_bad_updates_send_the_run_back_and_on_with_other_prompts(start, tmp_path):
    start(size="NaN", seed=2, bad_updates="back", checkpoint_every=2)
    path = tmp_path / "run"
    found = lines(path)
    assert len(found) == STEPS and not any(line["skipped"] for line in found)
    returns = [event for event in folder.events(path) if event["event"] == "went back"]
    assert returns and all(0 < event["step"] - event["to"] <= 3 for event in returns)
    state = state_of(path)
    assert all(np.isfinite(x).all() for name, x in state.items() if name.startswith(".params"))
    assert int(state[".memory['guard']['skipped']"]) == 0


def test_nothing_left_to_go_back_to(start, tmp_path):
    with pytest.raises(watch.BadUpdate, match="no checkpoint left to go back to"):
        start(size="NaN", seed=2, bad_updates="back", checkpoint_every=12)


def test_no_room_ends_the_run_or_is_waited_out(whole, start, tmp_path, no_room, capsys):
    path, room = tmp_path / "run", []

    def full():
        for thread in threading.enumerate():
            if thread.name == "checkpoint":
                thread.join()
        room.append(no_room(3000))
        room[0].__enter__()

    def free():
        room.pop().__exit__(None, None, None)

    try:
        with pytest.raises(checkpoint.SaveError, match=r"could not be written|too large"):
            start(at={4: full})
    finally:
        free()
    assert checkpoint.Checkpoints(path / "checkpoints").steps() == [3]
    start(resumed=True)
    assert lines(path) == whole[1]
    same(state_of(path), whole[2])

    try:
        with pytest.raises(checkpoint.SaveError):  # at the end there is nothing left to wait for
            start("unfinished", at={4: full}, save_errors="continue")
        assert not (tmp_path / "unfinished" / "summary.json").exists()
    finally:
        free()
    start("unfinished", resumed=True)
    assert lines(tmp_path / "unfinished") == whole[1]

    start("waited", at={4: full, 10: free}, save_errors="continue")
    assert lines(tmp_path / "waited") == whole[1]
    same(state_of(tmp_path / "waited"), whole[2])
    assert "not saved, going on" in capsys.readouterr().out
    assert checkpoint.Checkpoints(tmp_path / "waited" / "checkpoints").steps() == [3, 12]


def test_a_damaged_checkpoint_is_passed_over_and_said(whole, start, tmp_path, capsys):
    with pytest.raises(Stop):
        start(at={8: crash})
    path = tmp_path / "run"
    data = max((path / "checkpoints" / "6").rglob("*"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    start(resumed=True)
    said = capsys.readouterr().out
    assert "checkpoint 6 is damaged" in said and "going on from step 3" in said
    assert lines(path) == whole[1]


def test_data_that_changed_are_refused(start, tmp_path, monkeypatch, capsys):
    start(steps=2)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": "a"}) for i in range(30)))
    config["config"] |= {"task": "jsonl", "data": str(rows), "set": {"group_size": 2}, "steps": 4}
    config["data"] = folder.digest(rows)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    assert job.prepare(job.resumable(tmp_path / "run"), resumed=True).data == config["data"]
    rows.write_text(rows.read_text().replace("p7", "p77"))
    with pytest.raises(SystemExit):
        cli.main(["resume", str(tmp_path / "run")])
    assert "rows.jsonl has changed since the run began" in capsys.readouterr().err


def test_slots_and_partial_rollouts_resume_to_the_last_bit(tiny, letters, tmp_path):
    """Responses that are half done when the checkpoint is written go on as if it had not been."""
    recipe, policy = algorithms.load("april", group_size=2), language_model(tiny, slots=3)
    parts = learner(recipe, policy=policy, task=letters, optimizer=adamw(1e-2), prompts_per_step=4)
    init, step = jax.jit(parts.init), jax.jit(parts.step)
    state, metrics = init(jax.random.key(0)), []
    with Checkpoints(tmp_path) as saved:
        for i in range(1, 6):
            state, found = step(state)
            metrics.append(found)
            if i == 2:
                saved.save(i, state, {})
        again = saved.restore(jax.eval_shape(init, jax.random.key(0))).state
    assert again.memory["rollout"]["held"].any()
    for i in range(3, 6):
        again, found = step(again)
        same(found, metrics[i - 1])
    same(again, state)


def test_by_default_nothing_is_guarded(letters, monkeypatch):
    plain = Learner(init=lambda key: None, step=lambda state: None)
    monkeypatch.setattr(job, "learner", lambda *_, **__: plain)
    assert job.learner_of(a_job(TrainConfig(), letters)) is plain
    for how in ("skip", "stop", "back"):
        assert job.learner_of(a_job(TrainConfig(bad_updates=how), letters)).step is not plain.step
