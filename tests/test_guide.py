"""docs/compose_a_method.py runs from top to bottom, and shows what it says it shows."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "compose_a_method.py"


@pytest.mark.slow
def test_the_guide_runs(tmp_path):
    found = {"GUIDE_QUICK": "1", "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(GUIDE)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | found,
    )
    assert done.returncode == 0, done.stderr
    for line in (
        "{'advantage[0]': ('center_scale', 'partial(below_the_best, floor=0.5)')}",
        "at p = 1 it is another method",
        "TypeError: loss needs a function of (scores, batch); verified(batch",
        "ValueError: mc_grpo adds one pivot rollout: group_size must be even and at least 2, got 7",
        "ValueError: this recipe reads values (batch.value or scores.value) and has no critic",
        "ValueError: the advantage slot must return (8, 8)",
    ):
        assert line in done.stdout
    curves = [line for line in done.stdout.splitlines() if line.endswith("at the end")]
    assert [line.split("  ")[0] for line in curves] == ["grpo", "below the best"] and "nan" not in "".join(curves)
    assert (tmp_path / "runs" / "compose_a_method.png").exists() == bool(importlib.util.find_spec("matplotlib"))
