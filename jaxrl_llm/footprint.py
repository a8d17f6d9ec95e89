"""What a compiled step needs and takes on one chip: memory, time by phase, and what chips say to each other."""

from __future__ import annotations

import collections
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxrl_llm.chips import LATENCY, Topology
from jaxrl_llm.hlo import Collective
from jaxrl_llm.hlo_cost import Carried, Cost

# The parts of a step; names that stand in the source of an instruction, as `jax.named_scope` puts them there.
PHASES = ("generation", "scoring", "forward", "backward", "optimizer", "other")


class Memory(NamedTuple):
    """Bytes on one chip.

    Of `temporary`, `cache` is what sampling carries and changes, `reads` what it only reads (weights in the type of the
    computation, the prompts' cache). `total` is the most that is alive at once; where a program does not fit, the
    compiler names only that.
    """

    parameters: float
    optimizer: float
    other: float
    temporary: float
    cache: float
    reads: float
    program: float
    total: float
    limit: float | None

    @property
    def fits(self) -> bool:
        return self.limit is None or self.total <= self.limit


class Phase(NamedTuple):
    """A part of the step, on one chip. Seconds are None where the chip's figures are not known.

    roofline: each loop body takes as long as its matrix products at the peak or its memory traffic, whichever is more.
    estimate: the same with the compiler's own cycles in place of the peak.
    """

    flops: float
    bytes: float
    roofline: float | None
    estimate: float | None


class Exchange(NamedTuple):
    """A kind of collective of one size, `times` a step, and how long all of them take if nothing hides them."""

    kind: str
    bytes: int
    devices: int
    times: int
    seconds: float | None


def state_memory(params: Any, opt_state: Any, state: Any, where: Topology) -> Memory:
    """Of the state alone. `state` is all of it, or empty if there is nothing else; leaves as in `on_one`."""
    parts = on_one(params), on_one(opt_state)
    rest = max(on_one(state) - sum(parts), 0.0)
    limit = None if where.chip is None else where.chip.memory
    return Memory(*parts, rest, 0.0, 0.0, 0.0, 0.0, sum(parts) + rest, limit)


def on_one(tree: Any) -> float:
    """Bytes of one device's part of arrays; leaves are `jax.ShapeDtypeStruct`s with shardings."""
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * _itemsize(x) for x in jax.tree.leaves(tree)))


def _itemsize(x: Any) -> int:
    return 0 if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else int(x.dtype.itemsize)


def used(state: Memory, found: Any, cache: Carried) -> Memory:
    """With what the program needs besides; `found` is `compiled.memory_analysis()`."""

    arguments_, results = found.argument_size_in_bytes, found.output_size_in_bytes - found.alias_size_in_bytes
    total = arguments_ + results + found.temp_size_in_bytes + found.generated_code_size_in_bytes
    return state._replace(
        other=max(arguments_ - state.parameters - state.optimizer, 0.0) + results,
        temporary=found.temp_size_in_bytes,
        cache=min(cache.changed, found.temp_size_in_bytes),
        reads=min(cache.read, found.temp_size_in_bytes),
        program=found.generated_code_size_in_bytes,
        total=total,
    )


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_REFUSED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")


def refused(state: Memory, message: str) -> Memory:
    """What the compiler says it would need, where that is why it refused.

    Raises:
      RuntimeError: it refused for another reason.
    """
    found = _REFUSED.search(message)
    if found is None:
        raise RuntimeError(f"the step does not compile: {message}")
    used, limit = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
    temporary = used - state.parameters - state.optimizer - state.other
    return state._replace(temporary=temporary, total=used, limit=limit)


def _phase(source: str) -> str:
    if "transpose(" in source and "generation" not in source:
        return "backward"
    named = next((name for name in ("generation", "optimizer") if name in source), None)
    return named or ("forward" if "jvp(" in source else "scoring" if "scoring" in source else "other")


def phases(found: list[Cost], where: Topology) -> dict[str, Phase]:
    """By phase. What the compiler added (prefetches ...) belongs to what most of its loop body does."""
    bodies: dict[str, list[Cost]] = {}
    for cost in found:
        bodies.setdefault(cost.where, []).append(cost)
    total = dict.fromkeys(PHASES, Phase(0.0, 0.0, 0.0, 0.0))
    for body in bodies.values():
        weight = dict.fromkeys(PHASES, 0.0)
        for cost in body:
            weight[_phase(cost.source)] += cost.cycles + cost.flops + 1 if cost.source else 0.0
        most = max(PHASES, key=lambda name: weight[name])
        parts: dict[str, list[Cost]] = {}
        for cost in body:
            parts.setdefault(_phase(cost.source) if cost.source else most, []).append(cost)
        for name, costs_ in parts.items():
            total[name] = _sum(total[name], _timed(costs_, where))
    return total


def _timed(found: list[Cost], where: Topology) -> Phase:
    flops, moved, cycles = (sum(x) for x in zip(*((c.flops, c.bytes, c.cycles) for c in found), strict=True))
    if (chip := where.chip) is None:
        return Phase(flops, moved, None, None)
    traffic = moved / chip.bandwidth
    return Phase(flops, moved, max(flops / chip.flops, traffic), max(cycles / chip.clock, traffic))


def _sum(a: Phase, b: Phase) -> Phase:
    both: Any = (None if x is None or y is None else x + y for x, y in zip(a, b, strict=True))
    return Phase(*both)


def exchanges(found: list[Collective], where: Topology) -> list[Exchange]:
    """Collectives by kind, size and devices, those that take longest first."""
    count: collections.Counter[tuple[str, int, int]] = collections.Counter()
    for one in found:
        count[one.kind, one.bytes, one.devices] += one.times
    all_ = [_exchange(*key, n, where) for key, n in count.items()]
    return sorted(all_, key=lambda e: (-(e.seconds or 0.0), -e.bytes * e.times))


def _exchange(kind: str, size: int, devices: int, count: int, where: Topology) -> Exchange:
    """Along one axis of the torus, as a ring (both ways at once) if it is closed; and a hop's latency each."""
    devices = devices or where.devices
    if (chip := where.chip) is None or devices < 2:
        return Exchange(kind, size, devices, count, None if where.chip is None else 0.0)
    closed = all(n % chip.wraps == 0 for n in where.shape)
    bandwidth, hops = chip.link * (2 if closed else 1), devices // 2 if closed else devices - 1
    gathered = size * (devices - 1) / devices / bandwidth
    each = {
        "all-reduce": 2 * gathered,
        "all-to-all": size * devices / 4 / bandwidth,
        "collective-permute": size / chip.link,
    }.get(kind, gathered)
    return Exchange(kind, size, devices, count, count * max(each, hops * LATENCY))
