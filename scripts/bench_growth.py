"""How the cost of a GRPO step grows with one size at a time: seconds, CPU seconds, FLOPs and bytes.

    python scripts/bench_growth.py [--axis prompt response group depth vocabulary] [--repeats 3] [--out docs]

From one base point each axis takes a few values. Generation is timed alone; the update is the rest of the step. Memory
is the compiled step's temporaries (`memory_analysis`), beside its state. Every program is compiled before any is
timed, then all points take turns, so that a slow moment of the machine falls on all alike; times are medians. The
exponent is the slope between the two largest values on logarithmic axes: 1 is proportional, 2 quadratic, 0 free.
Writes `growth.md`, `growth.json` and, where matplotlib is installed, `growth.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.engine import learner
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Context, Prompts, Sampling

PROMPTS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    prompt: int = 64
    response: int = 32
    group: int = 8
    depth: int = 2
    vocabulary: int = 2048


AXES = {
    "prompt": (64, 256, 1024),
    "response": (16, 32, 64, 128),
    "group": (2, 8, 32),
    "depth": (1, 2, 4, 8),
    "vocabulary": (2048, 8192, 32768),
}
MEASURED = {
    "generation_s": "generation, s",
    "update_s": "update, s",
    "cpu_s": "CPU s of a step",
    "temporaries_mb": "temporaries, MB",
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--axis", nargs="+", default=list(AXES), choices=list(AXES))
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    args = p.parse_args()
    points = {axis: [dataclasses.replace(Point(), **{axis: n}) for n in AXES[axis]] for axis in args.axis}
    found = measured(list(dict.fromkeys(point for several in points.values() for point in several)), args.repeats)
    rows = {axis: [(getattr(point, axis), found[point]) for point in several] for axis, several in points.items()}
    text = page(rows, args.repeats)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, content in (("growth.md", text), ("growth.json", json.dumps(rows, indent=1) + "\n")):
        part = args.out / f".{name}"
        part.write_text(content)
        os.replace(part, args.out / name)
    picture(rows, args.out / "growth.png")


def measured(points: list[Point], repeats: int) -> dict[Point, dict[str, float]]:
    """Medians of every point; they take turns."""
    ready = {point: programs(point) for point in points}
    times: dict[Point, dict[str, list[float]]] = {point: {"step": [], "cpu": [], "generation": []} for point in points}
    for turn in range(repeats + 1):
        for point, (step, generate, _) in ready.items():
            cpu, seconds = time.process_time(), timed(step)
            spent = {"step": seconds, "cpu": time.process_time() - cpu, "generation": timed(generate)}
            for name, value in spent.items():
                times[point][name] += [value] if turn else []  # the first is not counted
    found = {}
    for point, (_, _, fixed) in ready.items():
        step, cpu, generation = (statistics.median(times[point][name]) for name in ("step", "cpu", "generation"))
        found[point] = {"generation_s": generation, "update_s": step - generation, "cpu_s": cpu, **fixed}
    return found


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def programs(point: Point) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, float]]:
    """A step and its generation, compiled, and what the compiler says of the step."""
    model = transformer(
        TransformerConfig(
            vocab_size=point.vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=point.depth,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
        )
    )
    policy, problem = language_model(model), task(point)
    parts = learner(grpo(group_size=point.group, kl=None), policy=policy, task=problem, prompts_per_step=PROMPTS)
    state = jax.jit(parts.init)(jax.random.key(0))
    step = jax.jit(parts.step).lower(state).compile()

    def rollouts(params: Any, key: Array) -> Any:
        context = jax.tree.map(lambda x: x[:, None], draw(point, key, PROMPTS).context)
        keys = jax.random.split(key, (PROMPTS, point.group))
        of = functools.partial(policy.sample, length=point.response, eos=(point.vocabulary,), stop=())
        return of(params, keys, context, Sampling(temperature=jnp.float32(1.0)))

    key = jax.random.key(1)
    generate = jax.jit(rollouts).lower(state.params["policy"], key).compile()
    memory, mega = step.memory_analysis(), 1e6
    fixed = {"temporaries_mb": memory.temp_size_in_bytes / mega, "state_mb": memory.argument_size_in_bytes / mega}
    return functools.partial(step, state), functools.partial(generate, state.params["policy"], key), fixed


def draw(point: Point, key: Array, n: int) -> Prompts:
    tokens = jax.random.randint(key, (n, point.prompt), 0, point.vocabulary)
    context = Context(tokens=tokens, mask=jnp.ones(tokens.shape, bool))
    return Prompts(context=context, index=jnp.arange(n), target=())


def task(point: Point) -> Task:
    """Random prompts without padding, a reward for every token 7, and no end before the last token."""
    return Task(
        name="growth",
        tokenizer=SimpleNamespace(eos_token_id=point.vocabulary, pad_token_id=0),
        rows=1,
        prompt_length=point.prompt,
        response_length=point.response,
        test=lambda n: draw(point, jax.random.key(0), n),
        draw=functools.partial(draw, point),
        verify=lambda prompts, tokens, mask: ((tokens == 7) & mask).sum(-1).astype(jnp.float32),
        grade=lambda prompts, completions, **_: [0.0] * len(completions),
        columns=lambda prompts: {},
    )


def exponent(rows: list[tuple[int, dict[str, float]]], name: str) -> float:
    (x0, y0), (x1, y1) = ((n, max(values[name], 1e-9)) for n, values in rows[-2:])
    return math.log(y1 / y0) / math.log(x1 / x0)


def page(rows: dict[str, list[tuple[int, dict[str, float]]]], repeats: int) -> str:
    base = ", ".join(f"{name} {n}" for name, n in dataclasses.asdict(Point()).items())
    lines = [
        "# How cost grows",
        "",
        f"`python scripts/bench_growth.py --repeats {repeats}` on {os.cpu_count()} CPU cores, float32, {PROMPTS} "
        f"prompts a step, width 128, one size at a time from: {base}. Medians of {repeats}; the points take turns.",
        "",
        f"| axis | size | {' | '.join(MEASURED.values())} |",
        f"| --- | --- |{' --- |' * len(MEASURED)}",
    ]
    for axis, several in rows.items():
        for n, values in several:
            lines.append(f"| {axis} | {n} | {' | '.join(f'{values[name]:.3g}' for name in MEASURED)} |")
        lines.append(f"| {axis} | exponent | {' | '.join(f'{exponent(several, name):.2f}' for name in MEASURED)} |")
    return "\n".join([*lines, "", "![curves](growth.png)", ""])


def picture(rows: dict[str, list[tuple[int, dict[str, float]]]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(rows), figsize=(2.6 * len(rows), 4.6), squeeze=False, layout="constrained")
    for (axis, several), (above, below) in zip(rows.items(), axes.T, strict=True):
        x = [n for n, _ in several]
        for name, label in (("generation_s", "generation"), ("update_s", "update")):
            above.loglog(x, [values[name] for _, values in several], "o-", label=label)
        below.loglog(x, [values["temporaries_mb"] for _, values in several], "o-", color="#555")
        above.set(title=axis)
        for plot in (above, below):
            plot.set_xticks(x, [str(n) for n in x])
            plot.minorticks_off()
    axes[0, 0].set_ylabel("seconds")
    axes[1, 0].set_ylabel("temporaries, MB")
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
