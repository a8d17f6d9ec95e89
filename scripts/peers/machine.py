"""What this machine can do: float32 matrix products (GFLOP/s) and memory bandwidth (GB/s).

python machine.py torch | jax | numpy      (each in the environment that has it)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

# [tokens of an update, or rows of a decoding step] x weights of tiny and small
SHAPES = [
    (2048, 2048, 2048),
    (6144, 896, 4864),
    (6144, 4864, 896),
    (6144, 256, 704),
    (6144, 896, 32000),
    (64, 896, 4864),
    (64, 4864, 896),
    (64, 896, 32000),
    (64, 256, 704),
    (64, 256, 512),
]
FLOATS = 64 << 20


def seconds(f: Callable[[], Any], budget: float = 1.5) -> tuple[float, float]:
    """(median, best) of at least five calls after two."""
    f()
    f()
    times: list[float] = []
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(times) < 5:
        t = time.perf_counter()
        f()
        times.append(time.perf_counter() - t)
    times.sort()
    return times[len(times) // 2], times[0]


def report(what: str, amount: float, unit: str, f: Callable[[], Any]) -> None:
    median, best = seconds(f)
    print(f"{what}: median {amount / median / 1e9:.1f} best {amount / best / 1e9:.1f} {unit}", flush=True)


def with_torch() -> None:
    import torch

    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        for m, k, n in SHAPES:
            x, y, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
            product = partial(torch.mm, x, y, out=out)
            report(f"torch {m}x{k}x{n}, {threads} threads", 2 * m * k * n, "GFLOP/s", product)
        a = torch.randn(FLOATS)
        b = torch.empty_like(a)
        report(f"torch copy, {threads} threads", 8 * FLOATS, "GB/s (read + write)", partial(b.copy_, a))
        report(f"torch sum, {threads} threads", 4 * FLOATS, "GB/s (read)", a.sum)


def with_jax() -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp

    def finished(f: Callable[..., Any], *args: Any) -> None:
        f(*args).block_until_ready()

    print("jax", jax.__version__, jax.devices())
    dot = jax.jit(jnp.dot)
    dot_transposed = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (1,)), ((), ()))))
    for m, k, n in SHAPES:
        x, y = jax.random.normal(jax.random.key(0), (m, k)), jax.random.normal(jax.random.key(1), (k, n))
        yt = jnp.array(y.T)
        report(f"XLA {m}x{k}x{n}", 2 * m * k * n, "GFLOP/s", partial(finished, dot, x, y))
        transposed = partial(finished, dot_transposed, x, yt)
        report(f"XLA {m}x{k}x{n}, weight stored [n, k]", 2 * m * k * n, "GFLOP/s", transposed)
    a = jnp.ones(FLOATS)
    add, total = jax.jit(lambda a: a + 1.0), jax.jit(jnp.sum)
    report("XLA a + 1", 8 * FLOATS, "GB/s (read + write)", partial(finished, add, a))
    report("XLA sum", 4 * FLOATS, "GB/s (read)", partial(finished, total, a))


def with_numpy() -> None:
    a, b = np.ones(FLOATS, np.float32), np.zeros(FLOATS, np.float32)
    threads = os.cpu_count() or 1
    edges = [i * FLOATS // threads for i in range(threads + 1)]
    parts = [slice(i, j) for i, j in pairwise(edges)]
    report("numpy copy, 1 thread", 8 * FLOATS, "GB/s (read + write)", lambda: np.copyto(b, a))
    with ThreadPoolExecutor(threads) as pool:

        def copy() -> None:
            list(pool.map(lambda s: np.copyto(b[s], a[s]), parts))

        def total() -> float:
            return sum(pool.map(lambda s: a[s].sum(), parts))

        report(f"numpy copy, {threads} threads", 8 * FLOATS, "GB/s (read + write)", copy)
        report(f"numpy sum, {threads} threads", 4 * FLOATS, "GB/s (read)", total)


if __name__ == "__main__":
    known = dict(torch=with_torch, jax=with_jax, numpy=with_numpy)
    if len(sys.argv) != 2 or sys.argv[1] not in known:
        raise SystemExit(__doc__)
    known[sys.argv[1]]()
