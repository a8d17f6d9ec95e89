"""Writes docs/plan.md: which models train on which TPU slices, as the compiler sees it. Needs the extra `tpu`, no TPU.

    python scripts/plan_table.py                 # all rows that are not there yet, one after the other
    python scripts/plan_table.py --rows 0 3      # these, again
    python scripts/plan_table.py --rows 0 --length 2048 --compiles 1
    python scripts/plan_table.py --least         # only what is certain to be needed, from shapes, in seconds
    python scripts/plan_table.py --write         # the page alone, from what is there

Each row is searched: from `rows` below on, the response length is doubled while the step fits and halved until it does,
at most `--compiles` times. What was compiled is kept in docs/plan.jsonl, a line each; the page is made of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
KEPT, PAGE = DOCS / "plan.jsonl", DOCS / "plan.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on a slice; prompts of 512 tokens, groups of 8."""

    model: str
    topology: str
    mesh: str
    prompts: int
    length: int  # of the first try
    accumulate: int

    def options(self, length: int) -> str:
        return (
            f"--model {self.model} --topology {self.topology} --mesh {self.mesh} --prompts-per-step {self.prompts} "
            f"--group-size 8 --prompt-length 512 --response-length {length} --accumulate {self.accumulate} "
            "--remat full --attention splash --set kl=none"
        )


ROWS = (
    Row("qwen2.5-0.5b", "v5e:2x2", "fsdp=4", 32, 1024, 8),
    Row("qwen2.5-0.5b", "v5e:4x4", "fsdp=16", 128, 1024, 8),
    Row("qwen2.5-1.5b", "v5e:2x2", "fsdp=4", 16, 1024, 4),
    Row("qwen2.5-1.5b", "v5e:4x4", "fsdp=16", 64, 2048, 4),
    Row("qwen2.5-7b", "v5e:8x8", "fsdp=16,tensor=4", 64, 2048, 4),
    Row("qwen2.5-7b", "v5p:2x2x2", "fsdp=8", 64, 2048, 8),
    Row("qwen2.5-32b", "v5p:2x4x4", "fsdp=8,tensor=4", 64, 2048, 8),
    Row("llama-3-70b", "v5p:4x4x8", "fsdp=16,tensor=8", 128, 2048, 8),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", help="numbers of the rows to compile, from 0")
    parser.add_argument("--length", type=int, help="of the first try, instead of the row's")
    parser.add_argument("--compiles", type=int, default=3, help="most compilations of a row")
    parser.add_argument("--least", action="store_true", help="what all rows need at least; compile nothing")
    parser.add_argument("--write", action="store_true", help="write the page and compile nothing")
    given = parser.parse_args()
    wanted = range(len(ROWS)) if given.rows is None else given.rows
    if given.least:
        keep([at_least(row) for row in ROWS])
    for row in [] if given.write or given.least else [ROWS[i] for i in wanted]:
        row = row if given.length is None else dataclasses.replace(row, length=given.length)
        search(row, given.compiles, again=given.rows is not None)
    PAGE.write_text(page(kept()))
    print(f"wrote {PAGE}")


def search(row: Row, compiles: int, again: bool) -> None:
    """The longest responses that fit, by doubling and halving."""
    known = {} if again else {x["config"]["response_length"]: x["fits"] for x in kept() if of(row, x)}
    length = row.length
    for _ in range(compiles):
        if length not in known:
            known[length] = compiled(row, length)["fits"]
        length = length * 2 if known[length] else length // 2
        if length < 128 or (length in known and known[length] != known.get(length * 2, True)):
            return


def compiled(row: Row, length: int) -> dict[str, Any]:
    """Runs the command in a process of its own, as memory of a compiler is not given back."""
    command = [sys.executable, "-m", "jaxrl_llm.cli", "plan", *shlex.split(row.options(length)), "--json"]
    print("+", "jaxrl-llm", *command[3:], flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 1) or not done.stdout:
        raise SystemExit(f"{row}: the command ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    keep([found])
    print("  fits" if found["fits"] else "  does not fit", f"in {found['seconds_to_compile']:.0f} s", flush=True)
    return found


def at_least(row: Row) -> dict[str, Any]:
    """The figures of `--no-compile`, in this process."""
    import jax

    from jaxrl_llm import cli
    from jaxrl_llm.plan import plan
    from jaxrl_llm.plan_text import as_json

    jax.config.update("jax_platforms", "cpu")
    config: Any = cli.parse(["plan", *shlex.split(row.options(row.length)), "--no-compile"])
    found: dict[str, Any] = json.loads(as_json(plan(config)))
    return found


def keep(found: list[dict[str, Any]]) -> None:
    with KEPT.open("a") as file:
        file.writelines(json.dumps(x) + "\n" for x in found)


def kept() -> list[dict[str, Any]]:
    """All that was compiled; the last of several of the same configuration."""
    lines = [json.loads(line) for line in KEPT.read_text().splitlines()] if KEPT.exists() else []
    return list({json.dumps(x["config"], sort_keys=True): x for x in lines}.values())


def of(row: Row, found: dict[str, Any], whole: bool = True) -> bool:
    """Whether these are figures of the row, `whole` ones or the least."""
    c = found["config"]
    same = c["compile"] == whole and (c["model"], c["topology"], c["mesh"]) == (row.model, row.topology, row.mesh)
    return same and (c["prompts_per_step"], c["accumulate"]) == (row.prompts, row.accumulate)


HEAD = """# What fits where

The whole GRPO step (sampling, scores, gradient, AdamW in float32; computation and cache in bfloat16) compiled ahead of
time for TPU slices, by `python scripts/plan_table.py` on a machine without a TPU. Prompts have 512 tokens and groups 8
rollouts; a gradient keeps each layer's input, and attention is the splash kernel. `jaxrl-llm plan` gives the same for
any model, recipe, mesh and slice.
"""
LEAST_HEAD = """## What is certain to be needed

From shapes and shardings alone (`--no-compile`, seconds; `python scripts/plan_table.py --least`), GiB of one chip:
parameters and optimiser stay, and with them is either a gradient or what sampling holds: layers in bfloat16, embedding
and output in float32, split by `tensor` alone. Activations come on top; only the compiler knows them.

"""
NOTES = """
Memory is that of one chip, GiB; "state" parameters, and two moments of AdamW, of which each chip holds its part. The
table has all that was tried; between two lengths of which one fits and one does not, nothing was.

The times are predictions, of which none was measured on a TPU. *Roofline*: every loop body takes as long as its matrix
products at the chip's peak or its traffic at the HBM's bandwidth, whichever is more. *Links*: all collectives, one
after the other, each along one axis of the torus. *Estimate*: the roofline with the compiler's own cycles of each
operation in place of the peak. A step takes at least the larger of roofline and links; estimate plus links is what it
takes if nothing hides anything. All responses are taken to have their full length. The share is of useful work (6
operations a parameter and token learned from, 2 sampled) in the peak, at that slower end.

How it is counted: the compiler's analysis counts a loop's body once. `jaxrl_llm/hlo_program.py` reads each loop's bound
from its condition (a loop that samples starts where the one before it ended) and multiplies. Bytes are those of main
memory: a slice counts the slice, an update in place the update, and what the compiler keeps in a chip's vector memory
nothing. Chips: `jaxrl_llm/chips.py`, with sources.
"""


def gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def times(x: dict[str, Any]) -> str:
    took = x["step_seconds"]
    return "" if took is None else ", ".join(f"{took[name]:.3g}" for name in ("roofline", "links", "estimate"))


def share(x: dict[str, Any]) -> str:
    took = x["step_seconds"]
    if took is None:
        return ""
    return f"{100 * x['model_flops'] / x['devices'] / x['peak_flops'] / (took['estimate'] + took['links']):.0f} %"


LONGEST_HEAD = """## The longest responses that fit

A chip's memory grows with the length a little faster than in a straight line (the row with three lengths shows it). The
longest responses that fit lie between the longest that was compiled and fits, and "at most": where the line through a
row's two longest reaches the chip's memory, as a multiple of 128.

"""


def longest(found: list[dict[str, Any]]) -> str:
    """A row's length at which the line through its two longest reaches the chip's memory."""
    (low, a), (high, b) = sorted((length_of(x), x["memory"]["total"]) for x in found)[-2:]
    room = (found[0]["memory"]["limit"] - b) * (high - low) / (b - a)
    return str(int(high + room) // 128 * 128)


LEAST = (
    ("model", lambda x: x["config"]["model"]),
    ("slice", lambda x: f"{x['accelerator']} ({x['config']['topology'].split(':')[1]})"),
    ("mesh", lambda x: x["config"]["mesh"]),
    ("rollouts x tokens", lambda x: f"{x['config']['prompts_per_step']} x 8 x {x['config']['response_length']}"),
    ("parameters", lambda x: gib(x["memory"]["parameters"])),
    ("optimiser", lambda x: gib(x["memory"]["optimizer"])),
    ("gradient", lambda x: gib(x["memory"]["parameters"])),
    ("sampling: weights and prompts", lambda x: gib(x["memory"]["reads"])),
    ("sampling: responses", lambda x: gib(x["memory"]["cache"])),
    ("at least / HBM", lambda x: f"{gib(x['memory']['total'])} / {gib(x['memory']['limit'])}"),
)
LONGEST: Any = (
    *((name, lambda row, read=read: read(row[0])) for name, read in LEAST[:3]),
    ("prompts x group", lambda row: f"{row[0]['config']['prompts_per_step']} x 8"),
    ("compiled: tokens (GiB)", lambda row: ", ".join(f"{length_of(x)} ({gib(x['memory']['total'])})" for x in row)),
    ("HBM", lambda row: gib(row[0]["memory"]["limit"])),
    ("at most", longest),
)
COLUMNS = (
    *LEAST[:4],
    ("accumulate", lambda x: str(x["config"]["accumulate"])),
    ("state", lambda x: gib(x["memory"]["parameters"] + x["memory"]["optimizer"])),
    ("cache", lambda x: gib(x["memory"]["cache"]) if x["fits"] else ""),
    ("in all / HBM", lambda x: f"{gib(x['memory']['total'])} / {gib(x['memory']['limit'])}"),
    ("fits", lambda x: "yes" if x["fits"] else "no"),
    ("roofline, links, estimate (s)", times),
    ("useful share of peak", share),
    ("compiled in", lambda x: f"{x['seconds_to_compile']:.0f} s"),
)


def page(found: list[dict[str, Any]]) -> str:
    """The tables, in the order of `ROWS`, and which rows are missing."""
    compiled_ = [x for row in ROWS for x in sorted(found, key=length_of) if of(row, x)]
    least = [x for row in ROWS for x in found if of(row, x, whole=False)]
    waiting = [i for i, row in enumerate(ROWS) if not any(of(row, x) for x in found)]
    left = [f"- `jaxrl-llm plan {ROWS[i].options(ROWS[i].length)}` (`--rows {i}`)" for i in waiting]
    parts = [HEAD, table(COLUMNS, compiled_) + NOTES if compiled_ else ""]
    rows = [sorted((x for x in found if of(row, x)), key=length_of) for row in ROWS]
    several = [row for row in rows if len(row) > 1]
    parts += [LONGEST_HEAD + table(LONGEST, several)] if several else []
    parts += ["## Not compiled yet\n\n" + "\n".join(left) + "\n"] if left else []
    parts += [LEAST_HEAD + table(LEAST, least)] if least else []
    return "\n".join(part for part in parts if part)


def table(columns: Any, found: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(name for name, _ in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(read(x) for _, read in columns) + " |" for x in found]
    return "\n".join(lines) + "\n"


def length_of(x: dict[str, Any]) -> int:
    return int(x["config"]["response_length"])


if __name__ == "__main__":
    main()
