"""The catalogue says what the code says: the page, the command line, and what is read of a method."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxrl_llm import algorithms, catalogue, cli

ROOT = Path(__file__).parents[1]


def test_the_page_is_not_behind_the_code():
    command = [sys.executable, str(ROOT / "scripts" / "catalogue.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def entries():
    return {e.name: e for e in catalogue.entries()}


@pytest.mark.parametrize("name", algorithms.names())
def test_a_method_says_what_it_is(name, entries):
    entry, file = entries[name], f"jaxrl_llm/algorithms/{name}.py"
    assert entry.family in catalogue.FAMILIES, f"{file}: Family is {entry.family!r}, not one of catalogue.FAMILIES"
    for field in ("summary", "deviations", "limit"):
        assert getattr(entry, field), f"{file}: no {field}"
    assert entry.source.title or entry.source.arxiv, f"{file}: a source has a title or an arXiv id"
    assert not [a.name for a in entry.arguments if not a.meaning], f"{file}: arguments that Args leaves out"
    assert entry.parent is None or entry.changes, f"{file}: the same recipe as {entry.parent}"


def test_only_known_methods_have_verdicts():
    assert set(catalogue.verdicts()) <= set(algorithms.names())


def test_what_differs_is_what_the_files_say(entries):
    assert entries["dr_grpo"].parent == "grpo"
    assert entries["dr_grpo"].changes == {
        "advantage[0]": ("center_scale", "center"),
        "loss.aggregate": ("sequence_mean_token_mean", "partial(token_sum_over, constant=None)"),
        "loss.terms": ("(partial(kl_to_reference, weight=0.04, estimator=k3),)", "()"),
    }
    assert entries["dr_grpo"].slots == ["advantage", "loss"]

    assert entries["gspo_token"].parent == "gspo"
    assert entries["gspo_token"].changes == {"loss.ratio": ("sequence_ratio", "sequence_ratio_per_token")}

    # Made of two recipes: the parent is the one its expression starts from, not the one whose loss it takes.
    assert entries["passk"].parent == "grpo"
    assert entries["grpo"].parent is None and entries["grpo"].changes == {}
    assert entries["dpo"].parent == "grpo"  # from nothing


def test_source():
    def read(text):
        found = catalogue.source(text)
        return found.title, found.arxiv, found.link

    assert read('"A, Title: It", 2503.20783, eq. 3; of "Another", 2504.14945.') == (
        "A, Title: It",
        "2503.20783",
        "https://arxiv.org/abs/2503.20783",
    )
    assert read("DeepSeekMath, 2402.03300, eq. 3")[:2] == ("DeepSeekMath", "2402.03300")
    assert read("1707.06347, eq. 7; GAE 1506.02438")[:2] == (None, "1707.06347")
    # The id of another paper is not the method's.
    assert read('"A Method", 2026; its numbers from 2510.08141.') == ("A Method", None, None)


def test_arguments_have_defaults_and_meanings(entries):
    size, _, kl, estimator = entries["grpo"].arguments
    assert (size.name, size.default, size.note) == ("group_size", 8, "not in the paper")
    assert size.meaning == "64 in the paper; 8 is usual."
    assert kl.default == 0.04 and estimator.default == "k3"

    drive = {a.name: a.default for a in entries["drive"].arguments}
    assert drive["steps"] == (32, 64, 32)
    shared = {a.name: a.meaning for a in entries["rollout_gdro"].arguments}  # `clip_low, clip_high: widths.`
    assert shared["clip_low"] == shared["clip_high"] == "widths."
    long = {a.name: a.meaning for a in entries["darling"].arguments}["same"]
    assert long.startswith("`(tokens") and long.endswith("`jax.pure_callback`.")


def test_confidence_is_what_deviations_admit(entries):
    for name in ("ahpo", "t_ppo", "dgpo"):
        assert entries[name].confidence == "in part"
    assert entries["grpo"].confidence == entries["april"].confidence == "whole"  # "Active Partial Rollouts" is a title
    assert catalogue.confidence("described only in part: no numbers") == "in part"
    assert catalogue.confidence("`partial(center, ddof=0)` is the paper's") == "whole"


def test_verdicts(tmp_path):
    assert catalogue.verdicts(tmp_path / "none.json") == {}
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    good.write_text('{"dapo": {"experiment": "dapo_aime", "verdict": "half of the gain"}}')
    bad.write_text('{"dapo": {"verdict": "yes"}}')
    found = catalogue.verdicts(good)["dapo"]
    tried = dataclasses.replace(catalogue.entry("dapo"), reproduced=found)
    assert catalogue.reproduced(tried) == "half of the gain (dapo_aime)"
    assert "| half of the gain (dapo_aime) |" in catalogue.markdown([tried])
    assert "Reproduced: half of the gain (dapo_aime)" in catalogue.plain_text(tried)
    with pytest.raises(ValueError, match="dapo needs an experiment and a verdict"):
        catalogue.verdicts(bad)


@pytest.mark.parametrize(("family", "says"), [("", "has no line `Family"), ("credits", "'credits' is not known")])
def test_a_method_without_family_has_no_place_on_the_page(entries, family, says):
    lost = dataclasses.replace(entries["dapo"], family=family)
    with pytest.raises(ValueError, match=f"algorithms/dapo.py: .*{says}"):
        catalogue.markdown([entries["grpo"], lost])


def test_cells_keep_their_bars_and_families_their_order(entries):
    page = catalogue.markdown(list(entries.values()))
    headings = [line[3:].lower() for line in page.splitlines() if line.startswith("## ")]
    assert headings == [f for f in catalogue.FAMILIES if f in headings]
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert len(rows) == len(entries)
    assert {row.replace("\\|", "").count("|") for row in rows} == {7}
    assert "KL(pi \\|\\| R^beta / Z)" in page


# --- the command line -------------------------------------------------------------------------------------------------


def said(capsys, *arguments):
    cli.main(["catalogue", *arguments])
    return capsys.readouterr().out


def test_json_is_complete(capsys, entries):
    found = json.loads(said(capsys, "--json"), parse_constant=pytest.fail)
    assert [e["name"] for e in found] == algorithms.names()
    fields = {f.name for f in dataclasses.fields(catalogue.Entry)}
    assert all(set(e) == fields for e in found)
    gspo_token = next(e for e in found if e["name"] == "gspo_token")
    assert gspo_token["changes"] == {"loss.ratio": ["sequence_ratio", "sequence_ratio_per_token"]}
    assert gspo_token["reproduced"] is None or set(gspo_token["reproduced"]) == {"experiment", "verdict"}


def test_table_has_a_line_a_method(capsys, entries):
    header, *lines = said(capsys).splitlines()
    assert header.split("  ")[0] == "method"
    assert [line.split()[0] for line in lines] == algorithms.names()
    line = next(line for line in lines if line.startswith("sapo "))
    assert "objective and clipping" in line and "2511.20347" in line and line.endswith("falling silent")


def test_table_fits_the_terminal(entries):
    lines = catalogue.table(list(entries.values()), width=80).splitlines()
    assert max(map(len, lines)) == 80 and lines[1].endswith("...")


def test_one_family(capsys, entries):
    found = json.loads(said(capsys, "--json", "--family", "Divergence"))
    assert {"clip_cov", "kl_cov"} <= {e["name"] for e in found}
    assert {e["family"] for e in found} == {"divergence and entropy"}


def test_show(capsys, entries):
    page = said(capsys, "show", "dr_grpo")
    assert page.startswith("dr_grpo: `grpo` without its two biases")
    assert "advantage=partial(per_group, center)" in page
    assert "max_length=None: the constant" in page
    assert "Differs from grpo:" in page and "    - center_scale\n    + center\n" in page
    assert "Limit: its gradient at the old policy" in page and "Reproduced: " in page
    assert json.loads(said(capsys, "show", "dr_grpo", "--json"))["limit"] == entries["dr_grpo"].limit


@pytest.mark.parametrize("name", algorithms.names())
def test_every_method_can_be_shown(name, entries):
    page = catalogue.plain_text(entries[name])
    assert all(f"  {a.name}={a.default}" in page for a in entries[name].arguments)
    assert "Algorithm(" in page


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "dr-gpro"], "no algorithm 'dr-gpro'; did you mean 'dr_grpo'?"),
        (["--family", "clippings"], "no family 'clippings'; did you mean 'objective and clipping'?"),
        (["--family", "credit", "show", "dapo"], "--family chooses methods for the table"),
        (["--family", "zzz"], "no family 'zzz'; there are policy gradient"),
        (["--family", "and"], "no family 'and'; there are supervised and mixed data"),
    ],
)
def test_wrong_names_are_errors_in_a_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["catalogue", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error and error.count("\n") == 1


def test_real_command_needs_no_transformers():
    code = "import sys; from jaxrl_llm.cli import main; main(); assert 'transformers' not in sys.modules"
    command = [sys.executable, "-c", code, "catalogue", "show", "gspo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gspo: `grpo` with one importance ratio a response")
    assert done.stderr == ""
