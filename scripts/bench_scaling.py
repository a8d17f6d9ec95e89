"""How a GRPO step scales over devices: `python scripts/bench_scaling.py [--layout fsdp] [--repeats 3] [--out docs]`.

Weak scaling: every device keeps its share of prompts, and the step is timed on 1, 2, 4 and 8 virtual CPU devices. They
share the cores of this machine, so the work grows with them and so does the time once the cores are full; what is above
the column "cores" is the price of splitting: exchanged bytes, and the arithmetic that is not split.

Strong scaling: one step's work in all, on paper. From the compiled program of each number of devices: what each
exchanges (every collective as a ring), and the matrix products of generation and gradient, on chips of `--flops` and
`--link`, without overlap: a lower bound of what the same program does there. The model is small (width 128): what
is exchanged does not shrink with the devices while their work does, which is what the speed-ups show.

Prints a table; with `--out` writes it there as `scaling.md`, with `scaling.json` and `scaling.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

from jaxrl_llm import algorithms, sharding, tasks
from jaxrl_llm.engine import learner
from jaxrl_llm.hlo import Collective, each_collective
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model

COUNTS = (1, 2, 4, 8)
LAYOUTS = {  # the mesh of n devices
    "data": lambda n: {"data": n},
    "fsdp": lambda n: {"fsdp": n},
    "tensor": lambda n: {"data": max(1, n // 2), "tensor": min(2, n)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, nargs="+", default=list(LAYOUTS))
    parser.add_argument("--prompts", type=int, default=4, help="per device (weak) and twice that in all (strong)")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps; the median counts")
    parser.add_argument("--flops", type=float, default=197e12, help="of a chip; TPU v5e's bfloat16 by default")
    parser.add_argument(
        "--link", type=float, default=1e11, help="bytes a second a chip sends; half of v5e's 1600 Gbit/s"
    )
    parser.add_argument("--out", type=Path, help="folder for scaling.md, scaling.json and scaling.png")
    options = parser.parse_args()
    rows = [row for layout in options.layout for row in scaled(layout, options)]
    print(table(rows))
    if options.out is not None:
        written(rows, options.out)


def written(rows: list[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n")
    said = "\n".join((__doc__ or "").split("\n")[2:-3])
    parts = ["# Scaling over devices", "`python scripts/bench_scaling.py --out docs` wrote this page.", said]
    (folder / "scaling.md").write_text("\n\n".join([*parts, table(rows), "![curves](scaling.png)"]) + "\n")
    picture(rows, folder / "scaling.png")


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (weak, strong) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    for layout in dict.fromkeys(row["layout"] for row in rows):
        mine = [row for row in rows if row["layout"] == layout]
        devices = [row["devices"] for row in mine]
        weak.plot(devices, [row["ratio"] for row in mine], "o-", label=layout)
        strong.plot(devices, [row["speedup"] for row in mine], "o-", label=layout)
    weak.plot(devices, [row["cores"] for row in mine], "k--", lw=1, label="cores alone")
    strong.plot(devices, devices, "k--", lw=1, label="ideal")
    weak.set(title="weak: time of a step, one device = 1", xlabel="virtual devices")
    strong.set(title="strong, on paper: speed-up", xlabel="chips")
    for axes in (weak, strong):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def scaled(layout: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in COUNTS:
        mesh = sharding.mesh(**LAYOUTS[layout](n), devices=jax.devices()[:n])
        seconds, exchanged, _ = timed(mesh, options.prompts * n, options.repeats)
        _, strong, flops = timed(mesh, options.prompts * max(COUNTS), 0)
        paper = flops / n / options.flops + sum(map(sent, strong)) / options.link
        row = {"layout": layout, "devices": n, "mesh": dict(mesh.shape), "seconds": seconds, "paper": paper}
        row["ratio"] = seconds / (rows[0]["seconds"] if rows else seconds)
        row["cores"] = max(1.0, n / (os.cpu_count() or 1))
        row["speedup"] = (rows[0]["paper"] if rows else paper) / paper
        row["sent"] = {"weak": sum(map(sent, exchanged)), "strong": sum(map(sent, strong))}
        row["kinds"] = {kind: sum(sent(x) for x in exchanged if x.kind == kind) for kind in {x.kind for x in exchanged}}
        rows.append(row)
    return rows


def timed(mesh: Any, prompts: int, repeats: int) -> tuple[float, list[Collective], float]:
    """Median seconds of a step (NaN without repeats), what devices exchange in it, and its matrix products' FLOPs."""
    task = tasks.load("arithmetic", digits=4)
    config = TransformerConfig(
        vocab_size=-(-len(task.tokenizer) // 8) * 8,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
    )
    group = 8
    recipe = algorithms.load("grpo", group_size=group, kl=None)
    policy = language_model(transformer(config))
    parts = learner(recipe, policy=policy, task=task, prompts_per_step=prompts, mesh=mesh)
    state = parts.init(jax.random.key(0))
    weights = sum(x.size for x in jax.tree.leaves(state.params["policy"]))
    tokens = prompts * (task.prompt_length + group * task.response_length)
    step = jax.jit(parts.step, donate_argnums=0).lower(state).compile()
    # A layer's loop has a known length; the sampler's has as many steps as a response may have tokens.
    exchanged = each_collective(step.as_text(), trips=task.response_length)
    taken = []
    for i in range(repeats + bool(repeats)):
        begun = time.perf_counter()
        state, metrics = step(state)
        jax.block_until_ready((state, metrics))
        taken += [time.perf_counter() - begun] if i else []
    return statistics.median(taken or [float("nan")]), exchanged, 8.0 * weights * tokens  # 2 forward, 6 with a gradient


def sent(one: Collective) -> float:
    """Bytes a device sends in a ring, in all runs of the instruction."""
    devices = max(one.devices, 2)
    share = 1.0 if one.kind == "collective-permute" else (devices - 1) / devices
    return one.times * one.bytes * share * (2.0 if one.kind == "all-reduce" else 1.0)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| mesh | weak: seconds | ratio | cores | MB sent by a device: all-gather | all-reduce | other "
        "| strong, on paper: MB sent | speed-up |",
        "|" + "---|" * 9,
    ]
    for row in rows:
        kinds = {kind: n / 1e6 for kind, n in row["kinds"].items()}
        gathered, reduced = kinds.pop("all-gather", 0.0), kinds.pop("all-reduce", 0.0)
        mesh = ",".join(f"{name}={n}" for name, n in row["mesh"].items() if n > 1) or "one device"
        lines.append(
            f"| {mesh} | {row['seconds']:.2f} | {row['ratio']:.2f} | {row['cores']:.1f} | {gathered:.1f} "
            f"| {reduced:.1f} | {sum(kinds.values()):.1f} | {row['sent']['strong'] / 1e6:.1f} | {row['speedup']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
