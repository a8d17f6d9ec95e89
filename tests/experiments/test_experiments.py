"""Ablations: every file says what it tries, and the harness says what came of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import harness
import jax.numpy as jnp
import numpy as np
import pytest
from harness import Arm, Comparison, Outcome, Study

from jaxrl_llm import algorithms

FOLDER = Path(__file__).parents[2] / "experiments"
STUDIES = sorted(p.stem for p in FOLDER.glob("*.py") if "STUDY =" in p.read_text())


def outcome(values, curve=((0.0, 1.0),), rate=1e-3):
    return Outcome(rate=rate, values={"avg@16": np.array(values)}, curves={"reward/mean": np.array(curve)})


@pytest.mark.parametrize("name", STUDIES)
def test_an_experiment_says_what_it_tries(name):
    module = importlib.import_module(name)
    assert all(harness.field(module.__doc__, title) for title in ("Command", "Time", "Claim", "Reported"))
    study = module.STUDY
    assert f"experiments/{name}.py" in harness.field(module.__doc__, "Command")
    assert any(c.main for c in study.comparisons)
    for c in study.comparisons:
        assert c.effect is not None or {c.arm, c.base} <= set(study.arms), c.text
    assert set(study.methods) <= set(algorithms.names())


def test_pass_at_k_is_the_chance_that_some_of_k_are_right():
    got = [float(harness.pass_at(jnp.array(c), k)) for c, k in ((0, 4), (1, 4), (2, 2), (13, 4), (16, 1))]
    want = [0, 4 / 16, 1 - 14 * 13 / (16 * 15), 1, 1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_bootstrap_holds_the_mean_and_is_narrow_where_seeds_agree():
    effect, low, high = harness.bootstrap(np.array([0.1, 0.2, 0.3, 0.2, 0.2]))
    assert effect == pytest.approx(0.2) and 0.1 <= low < effect < high <= 0.3
    assert harness.bootstrap(np.full(5, 0.5)) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    "values, sign, margin, verdict",
    [
        ([0.3, 0.4, 0.5], 1, 0.0, "reproduced"),
        ([0.3, 0.4, 0.5], -1, 0.0, "opposite"),
        ([-0.3, 0.1, 0.2], 1, 0.0, "not at this scale"),
        ([-0.02, -0.01, 0.0], 1, -0.03, "reproduced"),
        ([-0.02, -0.01, 0.0], 1, 0.0, "not at this scale"),
        ([-0.1, -0.2, -0.1], -1, 0.0, "reproduced"),
    ],
)
def test_verdicts(values, sign, margin, verdict):
    found = {"new": outcome(values), "old": outcome([0.0] * 3)}
    c = Comparison(text="", arm="new", base="old", sign=sign, margin=margin)
    assert harness.judged(c, found)["verdict"] == verdict


def test_a_study_is_as_good_as_its_worst_main_comparison():
    found = {"new": outcome([0.3, 0.4, 0.5]), "old": outcome([0.0] * 3)}
    both = (
        Comparison(text="up", arm="new", base="old"),
        Comparison(text="down", arm="new", base="old", sign=-1, main=False),
    )
    study = Study(arms={}, comparisons=both, methods=(), columns=("avg@16",))
    assert harness.summary(study, found)["verdict"] == "reproduced"
    study = Study(arms={}, comparisons=(both[0], Comparison(text="", arm="new", base="old", sign=-1)), methods=())
    assert harness.summary(harness.dataclasses.replace(study, columns=("avg@16",)), found)["verdict"] == "opposite"


def test_steps_to_a_target():
    held_out = np.array([[0.0, 0.6, 0.4], [0.0, 0.1, 0.2]])
    o = Outcome(rate=1.0, values={}, curves={"loss": np.zeros((2, 30)), "held_out": held_out})
    assert o.steps_to(0.5).tolist() == [20, 40]


def test_a_smoke_run_writes_a_table_a_file_and_says_its_seeds(tmp_path, capsys):
    doc = "X.\n\nClaim: something.\nReported: 1.\n"
    study = Study(
        arms={"grpo": Arm(recipe=algorithms.load("grpo", kl=None))},
        comparisons=(Comparison(text="not run in short", arm="grpo", base="other"),),
        methods=("grpo",),
        prompts=2,
        watch=10,
    )
    harness.main(doc, "same.py", study, ["--smoke", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "same.json").read_text())
    assert result["comparisons"][0]["effect"] == 0 and result["verdict"] == "not at this scale"
    assert result["seeds"] == 2 and len(result["arms"]["grpo"]["accuracy"]) == 2
    assert "# same: not at this scale" in (tmp_path / "same.md").read_text() and "same" in capsys.readouterr().out
