"""The least seconds that a workload can take on a machine of the given rates.

PEAK_GFLOPS=200 PEAK_GBS=45 python roofline.py        (rates: machine.py)
"""

from __future__ import annotations

import os

import workload as w


def floor(size: str, beta: float = 0.0, *, flops: float, bandwidth: float) -> dict[str, float]:
    """Seconds by part, every rollout of full length, nothing shared between the rollouts of a prompt.

    flops: floating-point operations per second of a matrix product. bandwidth: bytes per second.
    """
    c = w.SIZES[size]
    body, head = w.params(size)

    def attention(queries: float, keys: float) -> float:
        return 4 * w.ROWS * queries * keys * c["heads"] * c["head_dim"] * c["layers"]

    prefill = (2 * body * w.ROWS * w.PLEN + 2 * head * w.ROWS + attention(w.PLEN, w.PLEN / 2)) / flops
    decode = 0.0
    for t in range(1, w.NEW):  # the prefill gave the first new token
        length = w.PLEN + t
        work = 2 * (body + head) * w.ROWS + attention(1, length)
        moved = 4 * (body + head) + 8 * w.ROWS * length * c["kv_heads"] * c["head_dim"] * c["layers"]
        decode += max(work / flops, moved / bandwidth)
    forward = (2 * body * w.ROWS * w.SEQ + 2 * head * w.ROWS * w.NEW + attention(w.SEQ, w.SEQ / 2)) / flops
    optimiser = 28 * (body + head) / bandwidth  # AdamW: 4 arrays read, 3 written
    out = dict(prefill=prefill, decode=decode, ref=forward if beta else 0.0, update=3 * forward + optimiser)
    return out | dict(step=sum(out.values()))


if __name__ == "__main__":
    rates = dict(
        flops=1e9 * float(os.environ.get("PEAK_GFLOPS", "200")), bandwidth=1e9 * float(os.environ.get("PEAK_GBS", "45"))
    )
    for name in w.SIZES:
        print(name, {k: round(v, 4) for k, v in floor(name, 0.04, **rates).items()})
