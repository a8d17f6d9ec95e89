"""What an experiment leaves: a page, a file, a picture, and what the catalogue says of its methods."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxrl_llm
from jaxrl_llm import algorithms

RESULTS = Path(__file__).parent / "results"
VERDICTS = Path(jaxrl_llm.__file__).parent / "data" / "verdicts.json"


def field(doc: str, title: str) -> str:
    """The text after `title:` in a docstring, up to the next blank line or title."""
    match = re.search(rf"^{title}:\s*(.*?)(?=\n\s*\n|\n[A-Z][a-z]+:|\Z)", doc, flags=re.S | re.M)
    if match is None:
        raise ValueError(f"the experiment's docstring has no {title}:")
    return " ".join(match[1].split())


def spread(x: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(x):.3f} ± {np.std(x, ddof=1) if len(x) > 1 else 0:.3f}"


def bootstrap(difference: np.ndarray, draws: int = 10_000) -> tuple[float, float, float]:
    """Mean of `[seeds]` paired differences, and its 95 % percentile interval."""
    random = np.random.default_rng(0)
    means = random.choice(difference, (draws, len(difference))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def grid(header: list[str], rows: list[list[str]]) -> list[str]:
    """A table, in lines of Markdown."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def write(
    out: Path, result: Mapping[str, Any], page: str, draw: Callable[[Any], None], size: tuple[float, float]
) -> None:
    """`NAME.json`, `NAME.md` and, where matplotlib is installed, `NAME.png`; each replaced whole.

    Args:
      out: the folder.
      result: with "experiment", the name, and "verdict".
      page: Markdown.
      draw: `(figure)` fills it.
      size: of the figure, in inches.
    """
    name = result["experiment"]
    out.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("json", json.dumps(result, indent=1) + "\n"), ("md", page)):
        part = out / f".{name}.{suffix}"
        part.write_text(text)
        os.replace(part, out / f"{name}.{suffix}")
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=size, constrained_layout=True)
    draw(figure)
    figure.suptitle(f"{name}: {result['verdict']}", fontsize=10)
    figure.savefig(out / f"{name}.png", dpi=110)
    plt.close(figure)


def worst(compared: list[dict[str, Any]], of: str = "") -> str:
    """The verdict of a study's main comparisons, or of those about one of its methods."""
    main = [c for c in compared if c["main"]]
    mine = [c for c in main if c["of"] == of] if of else []
    return min((c["verdict"] for c in mine or main), key=("opposite", "not at this scale", "reproduced").index)


def write_verdicts() -> None:
    """What the catalogue says of each method: gathered from all results."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        for method in result["methods"]:
            compared = result.get("comparisons")
            verdict = worst(compared, method) if compared else result["verdict"]
            found[method] = {"experiment": result["experiment"], "verdict": verdict}
    found = {m: verdict for m, verdict in found.items() if m in algorithms.names()}  # options of the engine are none
    VERDICTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")


def curves(axis: Any, found: Mapping[str, Any], metric: str) -> None:
    """Mean over seeds, smoothed over ten steps, and the range of the seeds; `found` by arm, with `curves[metric]`."""
    for name, outcome in found.items():
        y = outcome.curves[metric]
        window = min(10, y.shape[1])
        y = np.stack([np.convolve(row, np.ones(window) / window, "valid") for row in y])
        x = np.arange(y.shape[1]) + window
        (line,) = axis.plot(x, y.mean(0), lw=1.6, label=name)
        axis.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.15, lw=0)
    axis.set(xlabel="step", ylabel=metric)
    axis.legend(fontsize=8, frameon=False)
