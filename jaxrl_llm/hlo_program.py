"""A compiled program, read from its text: instructions, loops, and how often each part runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|[a-z]\S*) ([a-z][a-z0-9\-]*)\((.*)$")
_BEGINS = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = ")
_NUMBER = re.compile(r"/\*index=\d+\*/")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    type: of the result, as written. operands: names of instructions of the same computation. inside: what stands in
    the parentheses. rest: the line after them.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    def attribute(self, name: str) -> str:
        """The text after `name=`, up to the next comma outside of brackets; empty if there is none."""
        found = re.search(rf"\b{name}=", self.rest)
        return "" if not found else _split(self.rest[found.end() :])[0].strip()

    @property
    def source(self) -> str:
        """The operation in the traced program it comes from; empty if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """Computations by name, the name of the first to run, and how often loops without a bound run in it."""

    computations: dict[str, Computation]
    entry: str
    unbounded: int


class Loop(NamedTuple):
    """A loop and how often it runs its body: `trips` at the most if `sampling`, which ends early, else exactly."""

    name: str
    body: str
    condition: str
    trips: int
    known: bool
    sampling: bool

    def ran(self, share: float) -> int:
        """Trips, if responses have this share of the tokens they may have."""
        return max(1, round(self.trips * share)) if self.sampling else self.trips


def parse(hlo_text: str, unbounded: int = 1) -> Program:
    """The instructions of a compiled program.

    Args:
      hlo_text: `compiled.as_text()`.
      unbounded: how often a loop of the first computation runs that has no bound, as one that refills slots.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry = name = ""
    for line in _whole_lines(hlo_text):
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = {}
            entry = name if header[1] else entry
        elif line.rstrip() == "}":
            name = ""
        elif name and (found := _LINE.match(line)):
            inside, rest = _closed(_NUMBER.sub("", found[5]))
            operands = tuple(part.split()[-1].lstrip("%") for part in _split(inside) if part.strip())
            computations[name][found[2]] = Instruction(
                found[2], found[3], found[4], operands, inside, rest, bool(found[1])
            )
    if not entry:
        raise ValueError("hlo_text has no ENTRY computation: it must be that of a compiled program, compiled.as_text()")
    return Program(computations, entry, unbounded)


def loops(program: Program) -> list[Loop]:
    """All loops. One whose condition asks for more than a bound (as `any row is alive`) is a `sampling` loop.

    A bound is the constant that an integer is compared with; the first value of that integer is a constant, or where
    the loop before it ended. A loop without such a bound is not `known`: it counts once, or `program.unbounded` times.
    """
    found: dict[str, Loop] = {}
    ends: dict[str, int] = {}
    for computation in program.computations.values():
        for instruction in computation.values():
            if instruction.op == "while":
                found[instruction.name] = _loop(program, computation, instruction, ends)
    return list(found.values())


def with_trips(hlo_text: str, share: float = 1.0, unbounded: int = 1) -> str:
    """The text with `known_trip_count` on every loop, for readers that look for it (`hlo.collectives`)."""
    trips = {loop.name: loop.ran(share) for loop in loops(parse(hlo_text, unbounded))}
    lines = []
    for line in hlo_text.splitlines():
        found = _LINE.match(line)
        if found and found[4] == "while" and not _TRIPS.search(line):
            line += f', "known_trip_count":{{"n":"{trips[found[2]]}"}}'
        lines.append(line)
    return "\n".join(lines)


# --- loops ------------------------------------------------------------------------------------------------------------


def _loop(program: Program, where: Computation, loop: Instruction, ends: dict[str, int]) -> Loop:
    body, condition = (loop.attribute(name).lstrip("%") for name in ("body", "condition"))
    root = next(i for i in program.computations[condition].values() if i.root)
    bound = _bound(program, program.computations[condition], root, {})
    sampling = bound is not None and bound.more
    if given := _TRIPS.search(loop.rest):
        return Loop(loop.name, body, condition, int(given[1]), True, sampling)
    if bound is None:
        refills = program.unbounded > 1 and where is program.computations[program.entry]
        return Loop(loop.name, body, condition, program.unbounded if refills else 1, False, refills)
    ends[loop.name] = bound.end
    start = _start(where, loop.operands[0], bound.element, ends)
    return Loop(loop.name, body, condition, max(bound.end - start, 0), True, sampling)


class _Bound(NamedTuple):
    element: int  # which one of what the loop carries is compared
    end: int
    more: bool  # the condition asks for something else too


Environment = dict[str, tuple[Computation, Instruction]]


def _bound(program: Program, where: Computation, x: Instruction, given: Environment) -> _Bound | None:
    """What a condition compares. `given` are the arguments of a fused computation, by parameter."""
    x, where = _through(where, x, given)
    if x.op == "fusion":
        inner = program.computations[x.attribute("calls").lstrip("%")]
        parameters = [i for i in inner.values() if i.op == "parameter"]
        given = {p.name: (where, where[x.operands[int(p.inside)]]) for p in parameters}
        return _bound(program, inner, next(i for i in inner.values() if i.root), given)
    if x.op == "and":
        sides = (_bound(program, where, where[name], given) for name in x.operands)
        found = next((side for side in sides if side is not None), None)
        return found if found is None else found._replace(more=True)
    if x.op != "compare" or x.attribute("direction") not in ("LT", "GT"):
        return None
    (left, _), (right, _) = (_through(where, where[name], given) for name in x.operands)
    small, large = (left, right) if x.attribute("direction") == "LT" else (right, left)
    if small.op != "get-tuple-element" or large.op != "constant" or not re.fullmatch(r"-?\d+", large.inside):
        return None
    return _Bound(int(small.attribute("index")), int(large.inside), False)


def _through(where: Computation, x: Instruction, given: Environment) -> tuple[Instruction, Computation]:
    """What `x` is a copy of."""
    while True:
        if x.op in ("copy", "bitcast", "convert", "reshape") and x.operands[0] in where:
            x = where[x.operands[0]]
        elif x.op == "parameter" and x.name in given:
            where, x = given[x.name]
            given = {}
        else:
            return x, where


def _start(where: Computation, name: str, index: int, ends: dict[str, int]) -> int:
    """Element `index` of what a loop starts with; 0 if nothing is known of it."""
    x = where.get(name)
    while x is not None:
        if x.op == "tuple":
            x = where.get(x.operands[index])
        elif x.op == "get-tuple-element":
            index, x = int(x.attribute("index")), where.get(x.operands[0])
        elif x.op in ("copy", "bitcast", "copy-done", "copy-start", "convert", "reshape", "opt-barrier"):
            x = where.get(x.operands[0])
        elif x.op == "while":
            return ends.get(x.name, 0)
        else:
            return int(x.inside) if x.op == "constant" and re.fullmatch(r"-?\d+", x.inside) else 0
    return 0


def runs_of(program: Program, share: float) -> dict[str, int]:
    """How often each computation runs by itself; fused ones do not. Every branch of a conditional counts as taken."""
    trips = {loop.name: loop.ran(share) for loop in loops(program)}
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for x in program.computations[name].values():
            for called, n in _called(x, trips):
                visit(called, times * n)

    visit(program.entry, 1)
    return runs


def _called(x: Instruction, trips: dict[str, int]) -> Iterator[tuple[str, int]]:
    if x.op == "while":
        yield x.attribute("body").lstrip("%"), trips[x.name]
        yield x.attribute("condition").lstrip("%"), trips[x.name] + 1
    elif x.op == "conditional":
        several = x.attribute("branch_computations").strip("{}").split(",")
        for name in [*several, x.attribute("true_computation"), x.attribute("false_computation")]:
            if name.strip():
                yield name.strip().lstrip("%"), 1
    elif x.op in ("call", "async-start"):
        name = x.attribute("to_apply") or x.attribute("calls") or x.attribute("called_computations").strip("{}")
        if name:
            yield name.lstrip("%"), 1


# --- text -------------------------------------------------------------------------------------------------------------


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those of an instruction that goes over several (a kernel's metadata) as one."""
    held = ""
    for line in text.splitlines():
        if not line.strip() or line.rstrip() == "}" or _HEADER.match(line) or _BEGINS.match(line):
            if held:
                yield held
            held = line
        else:
            held += line
    yield held


def _closed(text: str) -> tuple[str, str]:
    """What stands before the bracket that closes, and what after it."""
    depth = 1
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return text[:i], text[i + 1 :]
    return text, ""


def _split(text: str) -> list[str]:
    """At commas outside of brackets and quotes."""
    parts, depth, quoted, begin = [], 0, False, 0
    for i, c in enumerate(text):
        if c == '"':
            quoted = not quoted
        elif not quoted:
            depth += (c in "([{") - (c in ")]}")
            if c == "," and depth == 0:
                parts.append(text[begin:i])
                begin = i + 1
    return [*parts, text[begin:]]
