"""Runs the quickstart once per seed, each in a process of its own, and prints README's table.

python scripts/quickstart_table.py            # seeds 0, 1 and 2
python scripts/quickstart_table.py 3 4 -- --steps 60
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = (
    "| seed | accuracy before | accuracy after | reward before | reward after | training | steps |",
    "|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Runs and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="where the runs' folders go")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, more = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    summaries = [_run(seed, options.runs / f"quickstart-{seed}", more) for seed in options.seeds]
    print("\n".join([*HEADER, *map(_row, summaries)]))


def _run(seed: int, folder: Path, more: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "jaxrl_llm.cli", "quickstart", "--seed", str(seed), "--run", str(folder), *more]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"seed {seed}: {' '.join(command[1:])}", file=sys.stderr)
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    return json.loads((folder / "summary.json").read_text())


def _row(summary: dict) -> str:
    numbers = [summary[when][what] for what in ("accuracy", "reward") for when in ("before", "after")]
    cells = [str(summary["seed"]), *(f"{x:.3f}" for x in numbers), f"{summary['train_seconds']:.0f} s"]
    return f"| {' | '.join([*cells, str(summary['steps'])])} |"


if __name__ == "__main__":
    main()
