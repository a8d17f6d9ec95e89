"""Pictures of a run, from the files it left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

MUTED, REWARD, HELD_OUT, ENTROPY = "#8a8a8a", "#2171b5", "#c0392b", "#6a51a3"


def curve(folder: str | Path) -> Path | None:
    """Draws `curve.png` from `metrics.jsonl` and `summary.json`: what was learnt, and how.

    Left: mean reward of the rollouts, step by step and smoothed, and greedy accuracy on held-out problems. Right: the
    policy's entropy, and the share of groups that taught nothing because all their rewards were equal.

    Returns:
      the picture's path; None where matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), constrained_layout=True)
    steps, reward = _series(rows, "reward/mean")
    left.plot(steps, reward, color=REWARD, lw=0.8, alpha=0.35)
    left.plot(steps, _smooth(reward), color=REWARD, lw=1.8, label="reward of rollouts (sampled)")
    evaluations = [{"step": int(step), **values} for step, values in summary["evaluations"].items()]
    tested, accuracies = _series(sorted(evaluations, key=lambda e: e["step"]), "accuracy")
    left.plot(tested, accuracies, "o-", color=HELD_OUT, ms=4, label="held-out accuracy (greedy)")
    place: dict[str, Any] = {"xytext": (0, -13), "textcoords": "offset points", "ha": "center", "color": HELD_OUT}
    place["bbox"] = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
    for i in sorted({0, len(tested) - 1}) if len(tested) else ():
        left.annotate(f"{accuracies[i]:.2f}", (tested[i], accuracies[i]), fontsize=8, **place)
    left.set(xlabel="training step", ylim=(-0.08, 1.05))

    steps, entropy = _series(rows, "entropy")
    right.plot(steps, entropy, color=ENTROPY, lw=1.2, label="entropy (nats per token)")
    right.set(xlabel="training step", ylim=(0, None))
    other = right.twinx()
    steps, flat = _series(rows, "zero_variance_groups")
    other.plot(steps, _smooth(flat), color=MUTED, lw=1.2, ls="--", label="groups without contrast")
    other.set(ylim=(0, 1.02), ylabel="share of groups")
    right.set_ylabel("nats")
    _finish([left])
    _finish([right, other])
    path = folder / "curve.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    values = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in values]), np.array([value for _, value in values])


def _smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Centred running mean, over fewer values at the ends."""
    half = min(width, len(values)) // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _finish(axes: list[Any]) -> None:
    lines = [line for each in axes for line in each.get_lines() if not line.get_label().startswith("_")]
    # Above the picture, where no curve can run through it.
    place: dict[str, Any] = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncol": len(lines)}
    axes[-1].legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8, **place)
    for each in axes:
        each.spines["top"].set_visible(False)
        each.tick_params(labelsize=8)
        if len(axes) == 1:
            each.spines["right"].set_visible(False)
