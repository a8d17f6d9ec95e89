"""A run that is ended, resumed, short of room or given bad updates, in one process; see test_resume for real kills."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms, checkpoint, cli, execute, folder, job, watch
from jaxrl_llm.algorithm import describe
from jaxrl_llm.engine import learner
from jaxrl_llm.evaluate import Evaluation
from jaxrl_llm.guard import guard
from jaxrl_llm.job import Job, TrainConfig
from jaxrl_llm.models.transformer import TransformerConfig
from jaxrl_llm.policy import language_model
from jaxrl_llm.updates.optimizer import adamw

STEPS = 12
SIZE = "loss.terms[0].size"
BAD = 5  # prompts of this row make trouble


def trouble(scores, batch, *, size):
    """Not a number where a prompt of one row of the data is first."""
    return jnp.where(batch.prompts.index[0] == BAD, size, 0.0) * scores.logp


@pytest.fixture(scope="module")
def recipe():
    """Partial rollouts in memory, and a number that makes trouble."""
    base = algorithms.load("april", group_size=2)
    loss = dataclasses.replace(base.loss, terms=(partial(trouble, size=0.0),))
    return dataclasses.replace(base, loss=loss)


@pytest.fixture(scope="module")
def parts(recipe, tiny, letters):
    """Slots that are refilled; guarded, so that one program serves all tests."""
    policy = language_model(tiny, slots=3)
    return guard(learner(recipe, policy=policy, task=letters, optimizer=adamw(1e-2), prompts_per_step=4))


def evaluation(params):
    norm = float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(params)))
    return Evaluation(norm, norm, 1.0, 1, [{"prompt": "p", "response": "r", "reward": float("nan")}])


class Stop(Exception):
    """What ends a process here; what follows it never runs."""


@pytest.fixture
def start(parts, recipe, letters, monkeypatch, tmp_path):
    """`start(name, size=0.0, at={step: function}, **options)` executes a job; the functions are called after steps."""
    monkeypatch.setattr(execute, "evaluator", lambda *_, **__: evaluation)
    monkeypatch.setattr(execute.hf, "save", lambda *_, **__: None)

    monkeypatch.setattr(execute, "learner_of", lambda _: parts)
    begin = execute._start

    def run(name="run", *, size=0.0, at=None, resumed=False, **options):
        config = TrainConfig(run=tmp_path / name, **({"steps": STEPS, "checkpoint_every": 3} | options))
        config = job.resumable(tmp_path / name, options.get("steps")) if resumed else config
        add_lines = watch.Watch._add_lines

        def then(self, values):
            add_lines(self, values)
            (at or {}).get(self.record.step, lambda: None)()

        def troubled(*arguments):
            state, record = begin(*arguments)
            return dataclasses.replace(state, numbers={**state.numbers, SIZE: jnp.float32(size)}), record

        with monkeypatch.context() as patch:
            patch.setattr(execute, "_start", troubled)
            patch.setattr(watch.Watch, "_add_lines", then)
            model = TransformerConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=1, num_key_value_heads=1, head_dim=8)  # fmt: skip
            return execute.execute(
                Job(config=config, algorithm=recipe, task=letters, model=model, params=None,
                    tokenizer=letters.tokenizer, resumed=resumed)
            )  # fmt: skip

    return run


def lines(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return [{name: x for name, x in line.items() if name != "seconds"} for line in found]


def state_of(path, parts, step=STEPS):
    like = jax.eval_shape(parts.init, jax.random.key(0))
    return checkpoint.load(path / "checkpoints" / str(step), like)


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


@pytest.fixture
def whole(start, parts, tmp_path):
    """A run nobody disturbs: summary, lines, last state."""
    summary = start("whole", eval_every=4)
    return summary, lines(tmp_path / "whole"), state_of(tmp_path / "whole", parts)


def test_ended_and_resumed_is_the_undisturbed_run(whole, start, parts, tmp_path):
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
    same(state_of(path, parts), whole[2])
    del summary["train_seconds"], whole[0]["train_seconds"]
    assert summary == whole[0] and list(summary["evaluations"]) == ["0", "4", "8", "12"]
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


def test_a_longer_run_goes_on_as_if_it_had_been_asked_for_at_once(whole, start, parts, tmp_path):
    start(steps=5)
    start(resumed=True, steps=STEPS)
    assert lines(tmp_path / "run") == whole[1]
    same(state_of(tmp_path / "run", parts), whole[2])
    with pytest.raises(ValueError, match="has taken all of its 12 steps"):
        start(resumed=True)


def test_without_any_checkpoint_it_begins_again(whole, start, tmp_path):
    with pytest.raises(Stop):
        start(at={2: crash})
    start(resumed=True)
    assert lines(tmp_path / "run") == whole[1]


def test_what_the_checkpoint_says_of_the_run(whole, start, tmp_path):
    from orbax.checkpoint import v1 as ocp

    beside = ocp.metadata(tmp_path / "whole" / "checkpoints" / str(STEPS)).custom_metadata
    assert (beside["step"], beside["cursor"], beside["returns"]) == (STEPS, STEPS, 0)
    assert beside["config"] == json.loads((tmp_path / "whole" / "config.json").read_text())["config"]
    assert beside["versions"]["jax"] == jax.__version__ and beside["devices"]
    assert set(beside["evaluations"]) == {"0", "4", "8"}


def test_bad_updates_are_left_out_or_end_the_run(start, parts, tmp_path, capsys):
    start("skip", size=float("nan"), bad_updates="skip")
    found = lines(tmp_path / "skip")
    bad = [line["step"] for line in found if line["skipped"]]
    assert bad and len(bad) < STEPS / 2 and [line["loss"] is None for line in found] == [s in bad for s in range(1, 13)]
    state = state_of(tmp_path / "skip", parts)
    assert int(state.memory["guard"]["skipped"]) == len(bad) == found[-1]["skipped/total"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert f"step {bad[0]}: a bad update (loss not finite" in capsys.readouterr().out

    with pytest.raises(watch.BadUpdate, match=f"the update of step {bad[0]} was bad"):
        start("stop", size=float("nan"), bad_updates="stop")
    assert lines(tmp_path / "stop") == found[: bad[0]]
    kept = state_of(tmp_path / "stop", parts, bad[0]).params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))


def test_bad_updates_send_the_run_back_and_on_with_other_prompts(start, parts, tmp_path):
    start(size=float("nan"), bad_updates="back", checkpoint_every=2)
    path = tmp_path / "run"
    found = lines(path)
    assert len(found) == STEPS and not any(line["skipped"] for line in found)
    returns = [event for event in folder.events(path) if event["event"] == "went back"]
    assert returns and all(0 < event["step"] - event["to"] <= 3 for event in returns)
    state = state_of(path, parts)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))
    assert int(state.memory["guard"]["skipped"]) == 0


def test_nothing_left_to_go_back_to(start, tmp_path):
    with pytest.raises(watch.BadUpdate, match="no checkpoint left to go back to"):
        start(size=float("nan"), bad_updates="back", checkpoint_every=12)


def test_no_room_ends_the_run_or_is_waited_out(whole, start, parts, tmp_path, no_room, capsys):
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
    same(state_of(path, parts), whole[2])

    start("waited", at={4: full, 10: free}, save_errors="continue")
    assert lines(tmp_path / "waited") == whole[1]
    same(state_of(tmp_path / "waited", parts), whole[2])
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


def test_by_default_nothing_is_guarded(tmp_path):
    prepared = job.prepare(TrainConfig(run=tmp_path, task="sorting"))
    assert "guard" not in jax.eval_shape(job.learner_of(prepared).init, jax.random.key(0)).memory
    assert "grpo" not in describe(prepared.algorithm)
