"""What devices say to each other: the collectives of a compiled program, read from its text."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_SHAPE = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|[a-z]\S*) (?P<op>[a-z][a-z0-9\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Collective(NamedTuple):
    """One collective instruction of a program.

    kind: one of `KINDS`, the asynchronous forms under the same names.
    bytes: of the whole array that is put together or taken apart, on one device: what an all-gather returns, what a
        reduce-scatter is given; for the other kinds the two are equal.
    times: how often one run of the program does it.
    devices: how many take part, 0 for all.
    shapes: of the result, on one device.
    source: the operation in the traced program it comes from; empty if the compiler made it up.
    """

    kind: str
    bytes: int
    times: int
    devices: int
    shapes: tuple[tuple[int, ...], ...]
    source: str


def collectives(hlo_text: str, trips: int = 1) -> list[tuple[str, int, int]]:
    """Collectives by kind and size, those that move most in all first.

    Args:
      hlo_text: `compiled.as_text()`, of the optimised program.
      trips: how often a loop runs whose length the compiler does not know, as those that sample until all rows ended.

    Returns:
      `(kind, bytes, count)`: `bytes` as in `Collective`, and how often one run of the program does it.
    """
    total: collections.Counter[tuple[str, int]] = collections.Counter()
    for one in each_collective(hlo_text, trips):
        total[one.kind, one.bytes] += one.times
    return sorted(((kind, size, n) for (kind, size), n in total.items()), key=lambda x: (-x[1] * x[2], x))


def each_collective(hlo_text: str, trips: int = 1) -> list[Collective]:
    """Every collective instruction in its place; arguments as `collectives`."""
    computations, entry = _computations(hlo_text)
    runs = _runs(computations, entry, trips)
    found = []
    for name, lines in computations.items():
        for match in filter(None, map(_INSTRUCTION.match, lines)):
            kind = match["op"].removesuffix("-start")
            if kind in KINDS and runs[name]:
                found.append(_collective(kind, match, runs[name]))
    return found


def shape_bytes(text: str) -> int:
    """Bytes of all arrays in a type of the program's text, as `(f32[2,3]{1,0}, pred[])`."""
    return sum(math.ceil(math.prod(shape) * bits / 8) for bits, shape in _arrays(text))


def _collective(kind: str, match: re.Match[str], count: int) -> Collective:
    text = match["type"]
    if match["op"].endswith("-start") and kind in ("all-gather", "collective-permute", "reduce-scatter", "all-to-all"):
        text = _parts(text)[1]  # the operands come first
    devices = _devices(match["rest"])
    size = shape_bytes(text) * (max(devices, 1) if kind == "reduce-scatter" else 1)
    shapes = tuple(shape for _, shape in _arrays(text))
    source = re.search(r'op_name="([^"]*)"', match["rest"])
    return Collective(kind, size, count, devices, shapes, source[1] if source else "")


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation by its name, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif line.rstrip() == "}":  # a kernel's metadata goes over several lines, and may begin with one, too
            name = ""
        elif name:
            found[name].append(line)
    if not entry:
        raise ValueError("hlo_text has no ENTRY computation: it must be that of a compiled program, compiled.as_text()")
    return found, entry


def _runs(computations: dict[str, list[str]], entry: str, trips: int) -> collections.Counter[str]:
    """How often each computation runs. Of a conditional's branches each counts as taken."""
    calls = {name: list(_calls(lines, trips)) for name, lines in computations.items()}
    runs: collections.Counter[str] = collections.Counter({entry: 1})
    for name in _callers_first(calls, entry):
        for called, times in calls[name]:
            runs[called] += runs[name] * times
    return runs


def _calls(lines: list[str], trips: int) -> Iterator[tuple[str, int]]:
    for line in lines:
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        times = 1
        if match["op"] == "while":
            known = _TRIPS.search(line)
            times = int(known[1]) if known else trips
        for called in _CALLED.findall(line):
            yield called, times
        for several in _BRANCHES.findall(line):
            for called in several.split(","):
                yield called.strip().lstrip("%"), times


def _callers_first(calls: dict[str, list[tuple[str, int]]], entry: str) -> list[str]:
    order: list[str] = []
    seen: set[str] = set()

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for called, _ in calls.get(name, []):
                visit(called)
            order.append(name)

    visit(entry)
    return [name for name in reversed(order) if name in calls]


def _devices(text: str) -> int:
    """How many devices a group has, from any of the four ways in which groups are written."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", text):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(.*?\))? \{(.*?)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", named[1])}
        parts = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", named[2])  # a part of an axis gives its own size
        return math.prod(int(size) if size else sizes[name] for name, size in parts)
    return 2 if "source_target_pairs=" in text else 0


def _parts(text: str) -> list[str]:
    """The members of a tuple type."""
    parts, depth = [""], 0
    for c in text[1:-1]:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _arrays(text: str) -> list[tuple[int, tuple[int, ...]]]:
    """Bits of an element, and shape, of every array in a type."""
    return [(_bits(name), tuple(int(n) for n in sizes.split(",") if n)) for name, sizes in _SHAPE.findall(text)]


def _bits(name: str) -> int:
    """Of `f32`, `bf16`, `s4`, `f8e4m3fn` ...: their first number. A token has none and takes no room."""
    number = re.search(r"\d+", name)
    return 8 if name == "pred" else int(number[0]) if number else 0
