"""What one run of a compiled program costs a device: read from its text, every loop as often as it runs.

The compiler's own analysis (`compiled.cost_analysis()`) counts the body of a loop once. In a training step nearly all
work is in loops: layers, micro-batches, chunks of logits, tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrl_llm.hlo_program import Computation, Instruction, Program, loops, runs_of

_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\](\{[^}]*\})?")
# What moves nothing: names for what is there, and the second half of a pair, which is counted where it starts.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("partition-id", "replica-id", "opt-barrier", "domain", "add-dependency", "async-start", "async-update"),
    *(f"{kind}-done" for kind in ("async", "copy", "slice", "send", "recv", "custom-call")),
    *(f"{kind}-done" for kind in ("all-gather", "all-reduce", "collective-permute")),
}
# Custom calls that are notes to the compiler.
_NOTES = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "GatherScatterIndicesBitpacked"}
# Products of queries by keys, or of that size: forwards; for the queries' gradient; for that of keys and values.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Cost(NamedTuple):
    """Of one instruction in one run of the program, on one device.

    where: the computation it stands in, as the body of a loop. source: the operation in the traced program. runs: how
    often it runs. flops: of its matrix products, a multiply and an add being two. bytes: read from and written to main
    memory (a TPU's HBM; what stays in its vector memory is free). cycles: the compiler's own estimate, 0 where it gives
    none. All three are of all runs together.
    """

    name: str
    where: str
    op: str
    source: str
    runs: int
    flops: float
    bytes: float
    cycles: float


def costs(program: Program, share: float = 1.0) -> list[Cost]:
    """Every instruction that computes or moves something.

    Args:
      program: of a compiled step.
      share: of the tokens a response may have, how many it has: what the loops that sample run, of their most.
    """
    runs = runs_of(program, share)
    return [
        found
        for name, computation in program.computations.items()
        if runs.get(name)
        for instruction in computation.values()
        if (found := _cost(program, name, instruction, runs[name])) is not None
    ]


class Carried(NamedTuple):
    """Bytes of main memory that a sampling loop takes with it: what it changes (the responses' cache), and what it only
    reads (weights, the prompts' cache)."""

    changed: int
    read: int


def carried(program: Program) -> Carried:
    """Of the sampling loop that carries most; zeros if there is none."""
    found = [Carried(0, 0)]
    for loop in loops(program):
        if not loop.sampling:
            continue
        body = program.computations[loop.body]
        root = next(i for i in body.values() if i.root)
        changed = read = 0.0
        for i, name in enumerate(root.operands):
            kept = body[name]
            if kept.op == "get-tuple-element" and kept.attribute("index") == str(i):
                read += main_bytes(kept.type)
            else:
                changed += main_bytes(kept.type)
        found.append(Carried(int(changed), int(read)))
    return max(found, key=sum)


def main_bytes(text: str) -> float:
    """Bytes of all arrays in a type that live in main memory: those whose layout names no other (`S(1)`)."""
    return sum(size for size, main in _arrays(text) if main)


# --- one instruction --------------------------------------------------------------------------------------------------


def _cost(program: Program, name: str, x: Instruction, runs: int) -> Cost | None:
    if x.op in _FREE or (x.op == "custom-call" and x.attribute("custom_call_target").strip('"') in _NOTES):
        return None
    where = program.computations[name]
    inner = program.computations.get(x.attribute("calls").lstrip("%")) if x.op == "fusion" else None
    flops = _flops(where, x) if inner is None else _flops_inside(program, inner)
    moved = _moved(where, x) if inner is None else _moved_by_fusion(program, where, x, inner)
    found = re.search(r'"estimated_cycles":"(\d+)"', x.rest)
    return Cost(x.name, name, x.op, x.source, runs, runs * flops, runs * moved, runs * float(found[1] if found else 0))


def _flops_inside(program: Program, inner: Computation) -> float:
    total = 0.0
    for x in inner.values():
        if x.op == "fusion":
            total += _flops_inside(program, program.computations[x.attribute("calls").lstrip("%")])
        total += _flops(inner, x)
    return total


def _flops(where: Computation, x: Instruction) -> float:
    if x.op == "dot":
        left = _shape(where[x.operands[0]].type)
        contracted = (int(i) for i in x.attribute("lhs_contracting_dims").strip("{}").split(",") if i)
        return 2.0 * math.prod(_shape(x.type)) * math.prod(left[i] for i in contracted)
    if x.op == "convolution":
        return _convolution(_shape(where[x.operands[0]].type), _shape(where[x.operands[1]].type), x)
    return _splash(where, x) if x.op == "custom-call" else 0.0


def _splash(where: Computation, x: Instruction) -> float:
    """The splash kernel's, as if causality hid no tile; other kernels are not known."""
    products = next((n for name, n in _SPLASH.items() if name in x.source + x.name), 0)
    if not products:
        return 0.0
    # Queries and keys [B H L d] come first of what is not integers; a batch of one has lost its axis.
    q, k = [_shape(where[name].type) for name in x.operands if where[name].type.startswith(("bf16", "f"))][:2]
    return 2.0 * products * math.prod(q) * k[-2]


def _convolution(left: tuple[int, ...], right: tuple[int, ...], x: Instruction) -> float:
    """On a TPU every matrix product is one, its batch axes being spatial ones: only places that meet are counted."""
    ins, kernel, out = re.split("_|->", x.attribute("dim_labels"))
    window = dict(part.split("=") for part in x.attribute("window").strip("{}").split() if "=" in part)
    groups = int(x.attribute("feature_group_count") or 1), int(x.attribute("batch_group_count") or 1)
    pairs = 1.0
    for i in range(len(ins) - 2):
        n, k, o = left[ins.index(str(i))], right[kernel.index(str(i))], _shape(x.type)[out.index(str(i))]
        pairs *= _meeting(n, k, o, {name: value.split("x")[i] for name, value in window.items()})
    features = left[ins.index("f")] / groups[0] * right[kernel.index("o")]
    return 2.0 * features * left[ins.index("b")] / groups[1] * pairs


def _meeting(n: int, k: int, out: int, window: dict[str, str]) -> int:
    """Pairs of an output and a kernel position whose input is neither padding nor between dilated elements."""
    stride, spread, holes = (int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    low = int(window.get("pad", "0_0").split("_")[0])
    place = np.arange(out)[:, None] * stride + np.arange(k) * spread - low
    return int(((place >= 0) & (place <= (n - 1) * holes) & (place % holes == 0)).sum())


def _moved(where: Computation, x: Instruction) -> float:
    """Bytes of the operands and of the result; of a slice, only the slice."""
    result = main_bytes(x.type)
    if x.op in ("copy-start", "slice-start"):
        # The result is a tuple of what is written, what is read and a flag; of slices the first two change places.
        written = list(_arrays(x.type))[x.op == "slice-start"]
        source = main_bytes(where[x.operands[0]].type) > 0
        return written[0] * (written[1] + source)
    if x.op in ("slice", "dynamic-slice", "gather"):
        return result + (_size(x.type) if main_bytes(where[x.operands[0]].type) else 0.0)
    if x.op in ("dynamic-update-slice", "scatter"):
        update = where[x.operands[1 if x.op == "dynamic-update-slice" else -1]].type
        return main_bytes(update) + (_size(update) if result else 0.0)
    if x.op.endswith("-start"):  # a collective: the result repeats the operands
        return max(result, 2 * sum(main_bytes(where[name].type) for name in x.operands))
    return result + sum(main_bytes(where[name].type) for name in x.operands if name in where)


def _moved_by_fusion(program: Program, where: Computation, x: Instruction, inner: Computation) -> float:
    total = 0.0
    for i, name in enumerate(x.operands):
        size = main_bytes(where[name].type)
        total += min(size, _read(program, inner, _parameter(inner, i))) if size else 0.0
    root = next(i for i in inner.values() if i.root)
    parts = [inner[name] for name in root.operands] if root.op == "tuple" else [root]
    for (size, main), part in zip(_arrays(x.type), parts, strict=False):
        total += min(size, _written(part, inner)) if main else 0.0
    return total


def _parameter(inner: Computation, number: int) -> Instruction:
    return next(i for i in inner.values() if i.op == "parameter" and int(i.inside) == number)


def _read(program: Program, inner: Computation, x: Instruction) -> float:
    """Of a fusion's operand: the slices taken of it, if nothing else is done with it."""
    total = 0.0
    for user in inner.values():
        if x.name not in user.operands:
            continue
        if user.op in ("bitcast", "convert", "copy", "reshape"):
            total += _read(program, inner, user)
        elif user.op in ("slice", "dynamic-slice", "gather"):
            total += _size(user.type)
        elif user.op == "fusion":
            nested = program.computations[user.attribute("calls").lstrip("%")]
            total += _read(program, nested, _parameter(nested, user.operands.index(x.name)))
        elif not (user.op == "dynamic-update-slice" and user.operands[0] == x.name):  # that is updated in place
            return math.inf
    return total


def _written(x: Instruction, inner: Computation) -> float:
    """Of a fusion's result: the slice it writes, if it is an update in place."""
    while x.op in ("bitcast", "convert", "copy", "reshape") and x.operands[0] in inner:
        x = inner[x.operands[0]]
    return _size(inner[x.operands[1]].type) if x.op == "dynamic-update-slice" else math.inf


# --- types ------------------------------------------------------------------------------------------------------------


def _size(text: str) -> float:
    """Bytes of all arrays in a type, wherever they live."""
    return sum(size for size, _ in _arrays(text))


def _arrays(text: str) -> Iterator[tuple[float, bool]]:
    """Bytes of every array in a type, and whether it lives in main memory."""
    for kind, dimensions, layout in _ARRAY.findall(text):
        bits = re.search(r"\d+", kind)
        element = 1.0 if kind == "pred" else int(bits[0]) / 8 if bits else 0.0
        yield element * math.prod(int(n) for n in dimensions.split(",") if n), "S(" not in layout


def _shape(text: str) -> tuple[int, ...]:
    found = _ARRAY.search(text)
    return tuple(int(n) for n in found[2].split(",") if n) if found else ()
