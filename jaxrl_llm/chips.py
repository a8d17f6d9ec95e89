"""What TPU chips can do, by their public figures, and the slices they are sold in."""

from __future__ import annotations

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip, which is one JAX device (a v5p's two cores are one).

    memory: bytes of HBM a program may use. flops: peak, bfloat16, a second. bandwidth: of HBM, bytes a second. link:
    of one link to a neighbour, bytes a second in one direction. axes: of the torus. wraps: sizes of an axis from which
    (and in multiples of which) it is closed to a ring. clock: of a core, cycles a second.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    axes: int
    wraps: int
    cores: int
    clock: float


# Peak, HBM and ports: https://cloud.google.com/tpu/docs/v5e, /v5p, /v6e. Links in one direction and rings:
# https://jax-ml.github.io/scaling-book/tpus. What a program may use of the HBM is a little less than is sold: the
# figure the compiler itself names when a program does not fit. Clock: peak / (2 * multipliers of all matrix units).
CHIPS = {
    "v5e": Chip(
        memory=15.75 * 2**30,
        flops=197e12,
        bandwidth=819e9,
        link=45e9,
        axes=2,
        wraps=16,
        cores=1,
        clock=197e12 / (2 * 4 * 128**2),
    ),
    "v5p": Chip(
        memory=95.74 * 2**30,
        flops=459e12,
        bandwidth=2765e9,
        link=90e9,
        axes=3,
        wraps=4,
        cores=2,
        clock=459e12 / (2 * 8 * 128**2),
    ),
    "v6e": Chip(
        memory=31.25 * 2**30,
        flops=918e12,
        bandwidth=1640e9,
        link=90e9,
        axes=2,
        wraps=16,
        cores=1,
        clock=918e12 / (2 * 4 * 256**2),
    ),
}
LATENCY = 1e-6  # seconds from a chip to its neighbour: https://jax-ml.github.io/scaling-book/sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """Chips of one kind and how they are laid out; `chip` is None for virtual devices of this machine's CPU."""

    name: str
    shape: tuple[int, ...]
    chip: Chip | None

    @property
    def devices(self) -> int:
        return math.prod(self.shape)

    @property
    def sold_as(self) -> str:
        """The accelerator type: with the number of cores, which for v5p is two a chip."""
        return "" if self.chip is None else f"{self.name.partition(':')[0]}-{self.devices * self.chip.cores}"


def topology(text: str) -> Topology:
    """Reads `v5e:4x4`, `v5p:2x2x4`, `v6e:8x8` or `cpu:8`.

    Raises:
      ValueError: another kind, or a shape that kind does not come in.
    """
    kind, _, sizes = text.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", sizes):
        return Topology(name=text, shape=(int(sizes),), chip=None)
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(
            f"--topology: expected v5e:AxB, v6e:AxB, v5p:AxBxC with the chips along each axis, or cpu:N, got {text!r}"
        )
    shape = tuple(int(n) for n in sizes.split("x"))
    if len(shape) != CHIPS[kind].axes:
        example = "x".join(["4"] * CHIPS[kind].axes)
        raise ValueError(f"--topology: a {kind} slice has {CHIPS[kind].axes} axes, as {kind}:{example}, got {text!r}")
    return Topology(name=text, shape=shape, chip=CHIPS[kind])
