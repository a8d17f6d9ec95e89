"""Prefix Grouper, 2506.05433: a group's prompt encoded once instead of once for each response.

Command: python experiments/prefix_grouper.py
Time: about 7 minutes on two busy cores.
Claim: outputs and gradients stay the same, and the cost falls by the formula: position-wise work to (P + G R) / (G (P +
R)), attention to (P^2 + G R (2 P + R)) / (G (P + R)^2), for prefix length P, response length R and group size G.
Reported: cost and memory of about 1 / G at long prompts, identical loss curves.
Rule: "reproduced" if in every row the FLOPs ratio is within 10 % of the formula, masked pairs counted, and CPU time
falls by at least half of what the FLOPs ratio says; "opposite" if sharing costs more FLOPs or CPU time in most rows;
else "not at this scale".

XLA also computes the pairs of tokens that the causal mask hides, so the formula that FLOPs are held against counts
whole blocks; the paper's, which counts only the pairs that attend, stands beside it. Both add the logits, which are not
shared. That outputs and gradients are the same is what `tests/models/test_prefix.py` tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import bench_prefix
from pages import RESULTS, field, write

NAME = Path(__file__).stem
PREFIXES, GROUPS, RESPONSE = (64, 256, 1024), (2, 8, 16), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one small group: does it run? Writes only with --out")
    parser.add_argument("--repeats", type=int, default=5, help="timings of a layout, or more where they are short")
    parser.add_argument("--note", default="", help="what to know of the machine, written beside the times")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for prefix in PREFIXES[:1] if args.smoke else PREFIXES:
        for group in GROUPS[:1] if args.smoke else GROUPS:
            rows += bench_prefix.measure(prefix, group, RESPONSE, *((1, 0.0) if args.smoke else (args.repeats,)))
            print(bench_prefix.table(rows[-2:]).splitlines()[-1], file=sys.stderr, flush=True)
    result = {
        "experiment": NAME,
        **{key: field(__doc__ or "", key) for key in ("Claim", "Reported", "Rule")},
        "methods": [NAME],
        "verdict": verdict(rows),
        "note": args.note,
        "rows": rows,
    }
    if args.out or not args.smoke:
        write(args.out or RESULTS, result, page(result), partial(picture, rows=rows), (8, 3.6))
    print(page(result))


def verdict(rows: list[dict[str, Any]]) -> str:
    """By `Rule:` at the top."""
    exact = all(abs(x["flops_ratio"] / x["formula_with_masked_pairs"] - 1) <= 0.1 for x in rows)
    faster = all(1 - x["cpu_ratio"] >= (1 - x["flops_ratio"]) / 2 for x in rows)
    if exact and faster:
        return "reproduced"
    worse = sum(x["flops_ratio"] > 1 or x["cpu_ratio"] > 1 for x in rows)
    return "opposite" if 2 * worse > len(rows) else "not at this scale"


def page(result: Mapping[str, Any]) -> str:
    """Markdown: the claim, the numbers, how far from the formulas."""
    rows, c = result["rows"], bench_prefix.MODEL
    repeats = f"{min(row['repeats'] for row in rows)} to {max(row['repeats'] for row in rows)}"
    whole, paper = (
        max(abs(row["flops_ratio"] / row[name] - 1) for row in rows)
        for name in ("formula_with_masked_pairs", "formula")
    )
    how = (
        f"Scoring of one group (log-probs of responses of {RESPONSE} tokens), one layer of width {c.hidden_size} and a "
        f"vocabulary of {c.vocab_size}, float32, `python experiments/{NAME}.py`. FLOPs are of the compiled program; "
        f"seconds are medians of {repeats} on the clock, the two layouts taking turns; CPU time is of all threads. "
        f"Ratios are shared over separate. {result['note']}"
    )
    far = (
        f"The FLOPs ratio differs from the formula by at most {whole:.1%} if that counts masked pairs, which are "
        f"computed too, and by at most {paper:.1%} if it does not, as in the paper."
    )
    top = [f"# {NAME}: {result['verdict']}", f"Claim: {result['Claim']}", f"Reported: {result['Reported']}"]
    top.append(f"Rule: {result['Rule']}")
    return "\n\n".join([*top, how.strip(), bench_prefix.table(rows), far]) + "\n"


def picture(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Ratios against prefix length, forward and gradient."""
    axes = figure.subplots(1, 2, sharey=True)
    for axis, what in zip(axes, ("forward", "gradient"), strict=True):
        for i, group in enumerate(sorted({row["group"] for row in rows})):
            mine = [row for row in rows if row["pass"] == what and row["group"] == group]
            x, color = [row["prefix"] for row in mine], f"C{i}"
            axis.plot(x, [row["flops_ratio"] for row in mine], "o-", color=color, label=f"G = {group}")
            axis.plot(x, [row["cpu_ratio"] for row in mine], "x:", color=color)
            axis.plot(x, [row["formula"] for row in mine], "--", color=color, lw=0.8)
        axis.axhline(1, color="grey", lw=0.6)
        axis.set(xscale="log", xlabel="prefix length", title=what, ylim=(0, None))
        axis.set_xticks(x, [str(v) for v in x])
        axis.minorticks_off()
    axes[0].set_ylabel("shared / separate")
    axes[0].legend(fontsize=8, frameon=False, title="o FLOPs, x CPU time, -- paper", title_fontsize=8)


if __name__ == "__main__":
    main()
