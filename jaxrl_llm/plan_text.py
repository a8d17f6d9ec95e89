"""A plan as text: tables, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator

import numpy as np

from jaxrl_llm.footprint import Exchange
from jaxrl_llm.plan import Plan


def text(plan: Plan) -> str:
    """All that is known of the step, to read."""
    parts = [_headline(plan), _memory(plan)]
    if plan.phases:
        parts += [_phases(plan), _exchanges(plan)]
    if plan.unknown_loops:
        parts.append(f"{plan.unknown_loops} loops have no bound in the program and are counted once.")
    if found := advice(plan):
        parts.append(
            "\n".join(["To change:" if not plan.memory.fits else "To know:", *(f"- {line}" for line in found)])
        )
    return "\n\n".join(parts)


def as_json(plan: Plan) -> str:
    """The same for programs: bytes and seconds on one chip."""
    c = plan.config
    found = {
        "config": {k: str(v) if v is not None and k == "hlo" else v for k, v in dataclasses.asdict(c).items()},
        "devices": plan.topology.devices,
        "accelerator": plan.topology.sold_as,
        "mesh": plan.mesh,
        "parameters": plan.parameters,
        "group_size": plan.group_size,
        "fits": plan.memory.fits,
        "memory": plan.memory._asdict(),
        "phases": {name: phase._asdict() for name, phase in plan.phases.items()},
        "collectives": [one._asdict() for one in plan.exchanges],
        "model_flops": plan.model_flops,
        "compiler_counts_once": plan.once,
        "step_seconds": seconds(plan),
        "peak_flops": None if plan.topology.chip is None else plan.topology.chip.flops,
        "seconds_to_compile": plan.seconds_to_compile,
        "advice": advice(plan),
    }
    return json.dumps(found, indent=2, allow_nan=False)


def seconds(plan: Plan) -> dict[str, float] | None:
    """A step's time: `roofline` and `estimate` of all phases, `links` of all collectives; None on unknown chips.

    A step takes at least the larger of `roofline` and `links`; `estimate + links` is what nothing hidden would take.
    """
    if plan.topology.chip is None or not plan.phases:
        return None
    return {
        "roofline": sum(phase.roofline or 0.0 for phase in plan.phases.values()),
        "estimate": sum(phase.estimate or 0.0 for phase in plan.phases.values()),
        "links": sum(one.seconds or 0.0 for one in plan.exchanges),
    }


def advice(plan: Plan) -> list[str]:
    """What to change, the largest saving first, where the step does not fit; else what stands out."""
    return _too_large(plan) if not plan.memory.fits else _slow(plan)


def _too_large(plan: Plan) -> list[str]:
    m, limit = plan.memory, plan.memory.limit or math.inf
    state = m.parameters + m.optimizer + m.other
    over = f"{_gib(m.total - limit)} too much of {_gib(limit)}"
    first = f"The state takes {_gib(state)} a chip, the rest {_gib(m.total - state)}: {over}."
    return [first, *_less_state(plan, state, limit), *_fewer_rows(plan)]


def _less_state(plan: Plan, state: float, limit: float) -> Iterator[str]:
    data, fsdp, tensor = (plan.mesh[name] for name in ("data", "fsdp", "tensor"))
    if data > 1:
        saved = _gib(state * (1 - 1 / data))
        yield (
            f"--mesh data=1,fsdp={fsdp * data},tensor={tensor}: split the state over all chips that share the prompts, "
            f"{saved} less state a chip."
        )
    held = plan.parameters * np.dtype(plan.model.dtype).itemsize / tensor
    if held > 0.2 * limit and fsdp % 2 == 0:
        yield (
            f"--mesh data={data},fsdp={fsdp // 2},tensor={2 * tensor}: sampling holds weights split by tensor alone, "
            f"{_gib(held)} a chip now and half of it then."
        )
    if state > 0.6 * limit:
        chips = math.ceil(2 * state * plan.topology.devices / limit)
        yield f"A larger slice: on {chips} chips the state takes half of the memory."
    if plan.memory.parameters > 0.75 * plan.memory.optimizer:  # AdamW holds two numbers for each that is trained
        yield "--set kl=none, if the recipe has it: parameters are twice those of the policy, a reference is kept."


def _fewer_rows(plan: Plan) -> Iterator[str]:
    c, share = plan.config, plan.mesh["data"] * plan.mesh["fsdp"]
    more, decoded = 2 * c.accumulate, c.slots or c.prompts_per_step * plan.group_size
    if c.prompts_per_step % more == 0 and c.prompts_per_step // more >= share:
        yield f"--accumulate {more}: half the rows in a gradient at a time, the same result."
    if c.remat != "full":
        yield "--remat full: a gradient keeps a layer's input only, for one more forward pass."
    if c.attention != "splash" and plan.topology.chip is not None:
        yield "--attention splash: no array of queries by keys, if the model has neither windows nor soft caps."
    if c.logits_bytes > 2**26 * plan.topology.devices:
        yield f"--logits-bytes {c.logits_bytes // 4}: logits in smaller chunks."
    if decoded > share:
        yield f"--slots {decoded // 2}: half the rows decode at a time, in half the cache."
    yield f"--response-length {c.response_length // 2}, or --group-size {max(plan.group_size // 2, 2)}."


def _slow(plan: Plan) -> list[str]:
    took = seconds(plan)
    if took is None:
        return []
    found, m = [], plan.memory
    generation = plan.phases["generation"]
    if took["links"] > took["roofline"]:
        top = plan.exchanges[0]
        found.append(
            f"Links take longer than computing, most of it {top.times} times {top.kind} of {_bytes(top.bytes)}: fewer "
            "chips along tensor, or more prompts a chip."
        )
    if (generation.roofline or 0.0) > 0.5 * took["roofline"]:
        found.append("Generation is most of the step: more rollouts a chip cost it little while it reads weights.")
    if m.limit is not None and m.total < 0.5 * m.limit and plan.config.accumulate > 1:
        found.append(f"Half the memory is free: --accumulate {plan.config.accumulate // 2} makes fewer, larger parts.")
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def _headline(plan: Plan) -> str:
    c, where = plan.config, plan.topology
    mesh = ",".join(f"{name}={n}" for name, n in plan.mesh.items())
    kind = where.name if where.chip is None else f"{where.name} ({where.sold_as}, {where.devices} chips)"
    layers = f", {c.layers} of its layers" if c.layers else ""
    return (
        f"{c.model}{layers}: {plan.parameters / 1e9:.2f} G parameters, {c.algorithm}, on {kind} as {mesh}\n"
        f"{c.prompts_per_step} prompts x {plan.group_size} rollouts, {c.prompt_length} + {c.response_length} tokens, "
        f"accumulate {c.accumulate}, {c.dtype}; "
        + (f"compiled in {plan.seconds_to_compile:.0f} s" if c.compile else "not compiled")
    )


def _memory(plan: Plan) -> str:
    m = plan.memory
    rows = [("parameters", m.parameters), ("optimiser", m.optimizer), ("other arguments and results", m.other)]
    rows.append(("temporaries", m.temporary))
    if m.cache:
        rows += [("  sampling changes (its cache)", m.cache), ("  sampling reads (weights ...)", m.reads)]
    sure = plan.config.compile
    rows += [("program", m.program), ("in all", m.total)] if sure else [("at least", m.total)]
    if m.limit is not None:
        rows.append(("the chip has", m.limit))
    lines = [f"{name:<32}{_gib(size):>12}" for name, size in rows]
    if m.limit is not None:
        fits = "It fits." if sure else "It may fit: without --no-compile the compiler says whether it does."
        lines.append(fits if m.fits else "It does not fit.")
    return "\n".join(["memory of one chip", *lines])


def _phases(plan: Plan) -> str:
    lines = [f"{'one chip, one step':<20}{'TFLOP':>10}{'GB moved':>10}{'roofline':>11}{'estimate':>11}"]
    for name, p in plan.phases.items():
        lines.append(f"{name:<20}{p.flops / 1e12:>10.3f}{p.bytes / 1e9:>10.1f}{_s(p.roofline):>11}{_s(p.estimate):>11}")
    useful, once = plan.model_flops / plan.topology.devices, plan.once.get("flops", 0.0)
    lines.append(
        f"Useful work: {useful / 1e12:.3f} TFLOP a chip. The compiler counts {once / 1e12:.3f}, each loop once."
    )
    if (took := seconds(plan)) is not None and plan.topology.chip is not None:
        low, high = max(took["roofline"], took["links"]), took["estimate"] + took["links"]
        share = useful / plan.topology.chip.flops
        lines.append(
            f"A step takes between {_s(low)} (all hidden behind the slowest) and {_s(high)} (nothing hidden): "
            f"{100 * share / high:.0f} to {100 * share / low:.0f} % of the peak in useful work."
        )
    return "\n".join(lines)


def _exchanges(plan: Plan, most: int = 8) -> str:
    if not plan.exchanges:
        return "No collectives."
    total = sum(one.seconds or 0.0 for one in plan.exchanges)
    lines = [f"{'collectives':<20}{'chips':>7}{'each':>12}{'a step':>9}{'in all':>12}{'links':>11}"]
    lines += [_line(one) for one in plan.exchanges[:most]]
    if rest := plan.exchanges[most:]:
        size, took = sum(x.bytes * x.times for x in rest), sum(x.seconds or 0.0 for x in rest)
        shown = None if plan.topology.chip is None else took
        lines.append(f"{f'{len(rest)} others':<20}{'':>7}{'':>12}{'':>9}{_bytes(size):>12}{_s(shown):>11}")
    if plan.topology.chip is not None:
        lines.append(f"All collectives: {_s(total)} of the links' time.")
    return "\n".join(lines)


def _line(x: Exchange) -> str:
    moved = _bytes(x.bytes * x.times)
    return f"{x.kind:<20}{x.devices:>7}{_bytes(x.bytes):>12}{x.times:>9}{moved:>12}{_s(x.seconds):>11}"


def _gib(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= 0.1 * scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size:.0f} B"


def _bytes(size: float) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"


def _s(x: float | None) -> str:
    if x is None:
        return "-"
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if x >= scale:
            return f"{x / scale:.3g} {unit}"
    return "0 s" if x < 5e-9 else f"{x / 1e-6:.2f} us"
