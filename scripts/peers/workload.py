"""The workloads that every script in this folder runs. Standard library only.

GRPO on random weights, float32, one update per batch, AdamW with gradients clipped at 1.0; 8 prompts x 8 rollouts = 64
rollouts a step, prompts left-padded to 32 tokens, exactly 64 new tokens each (EOS lies past the vocabulary).

    W1  fixed length            (nothing)
    W2  long shared prompt      BENCH_PLEN=512
    W3  long-tailed lengths     BENCH_TAIL=1, or --tail: 32 prompts x 8 = 256 rollouts of at most 128 tokens from a
                                policy that ends with probability 4/128 a token: the mean is a quarter of the maximum
    W4  research scale          BENCH_NEW=16 with --size research

BENCH_CKPT names the folder of the checkpoints (make_model.py), BENCH_OUT a file to append the results to.
"""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import tempfile
from typing import Any

SIZES = {
    "tiny": dict(hidden=256, layers=4, heads=4, kv_heads=2, head_dim=64, inter=704, vocab=512),
    # The widths of Qwen2.5-0.5B with 4 of its 24 layers and 32,000 of its 151,936 ids.
    "small": dict(hidden=896, layers=4, heads=14, kv_heads=2, head_dim=64, inter=4864, vocab=32000),
    "research": dict(hidden=64, layers=2, heads=2, kv_heads=1, head_dim=32, inter=176, vocab=512),
}
TAIL = os.environ.get("BENCH_TAIL", "0") == "1"
CKPT = os.environ.get("BENCH_CKPT", os.path.join(tempfile.gettempdir(), "bench_ckpt"))
PROMPTS = int(os.environ.get("BENCH_PROMPTS", "32" if TAIL else "8"))
GROUP = 8
PLEN = int(os.environ.get("BENCH_PLEN", "32"))
NEW = int(os.environ.get("BENCH_NEW", "128" if TAIL else "64"))
ROWS = PROMPTS * GROUP
SEQ = PLEN + NEW
LR, WD, CLIP, BETAS, EPS = 1e-6, 0.0, 1.0, (0.9, 0.999), 1e-8
ROPE_THETA, NORM_EPS = 1_000_000, 1e-6
PAD_ID = 0


def eos_id(size: str, tail: bool = TAIL) -> int:
    """The last id of the vocabulary where texts end by themselves, else one that the model has no logit for."""
    return SIZES[size]["vocab"] - (1 if tail else 0)


def checkpoint(size: str, tail: bool = TAIL) -> str:
    return os.path.join(CKPT, size + ("-tail" if tail else ""))


def prompts(steps: int, seed: int = 0) -> list[str]:
    """`steps * PROMPTS` texts, one character a token; one of every 8 is of full length, so each batch pads to PLEN."""
    rng = random.Random(seed)
    lengths = [PLEN * f // 32 for f in (32, 20, 22, 24, 26, 28, 30, 31)]
    characters = "abcdefghijklmnopqrstuvwxyz +-*/=0123456789"
    return ["".join(rng.choice(characters) for _ in range(lengths[i % 8])) for i in range(steps * PROMPTS)]


def reward(prompts: Any = None, completions: Any = None, **_: Any) -> list[float]:
    """How many '7' a completion holds."""
    return [float(c.count("7")) for c in completions]


def params(size: str) -> tuple[int, int]:
    """(matrix-product parameters a token passes in the body, those of the head)."""
    c = SIZES[size]
    q, kv = c["heads"] * c["head_dim"], c["kv_heads"] * c["head_dim"]
    per_layer = c["hidden"] * (2 * q + 2 * kv) + 3 * c["hidden"] * c["inter"]
    return c["layers"] * per_layer, c["hidden"] * c["vocab"]


def check_lengths(lengths: list[int]) -> None:
    """Fails where a peer did other work than the workload says."""
    if TAIL:
        assert len(lengths) == ROWS and max(lengths) <= NEW, (len(lengths), max(lengths))
    else:
        assert len(lengths) == ROWS and set(lengths) == {NEW}, (len(lengths), set(lengths))


def cpu_seconds() -> tuple[float, float]:
    """(seconds stolen by the machine's host, seconds that other processes used); zeros where /proc is missing."""
    try:
        with open("/proc/stat") as f:
            t = [int(x) / os.sysconf("SC_CLK_TCK") for x in f.readline().split()[1:]]
    except OSError:
        return 0.0, 0.0
    return t[7], t[0] + t[1] + t[2] + t[5] + t[6] - sum(os.times()[:4])


_last: list[float] = []


def others() -> float:
    """CPU seconds that everything but this process took since the last call."""
    now = sum(cpu_seconds())
    passed = max(0.0, now - _last[0]) if _last else 0.0
    _last[:] = [now]
    return passed


def summary(
    name: str, version: str, size: str, beta: float, steps: list[dict[str, float]], extra: dict[str, Any], skip: int = 2
) -> dict[str, Any]:
    """Prints `RESULT {json}`.

    steps: seconds by part (step, gen, ref, score, update), `new_tokens` (real ones) and `oth` (CPU seconds of other
    processes). The first `skip` are left out, and so are those in which others took more than 5 % of a core, if at
    least 5 remain.
    """
    use = steps[skip:]
    if not use:
        raise SystemExit(f"--steps must be more than --skip: got {len(steps)} and {skip}")
    clean = [s for s in use if s["oth"] < 0.05 * s["step"]]
    out: dict[str, Any] = dict(
        peer=name, version=version, size=size, beta=beta, tail=TAIL, rows=ROWS, plen=PLEN, new=NEW
    )
    out |= dict(n_all=len(use), clean=len(clean) >= 5, skipped=skip)
    use = clean if len(clean) >= 5 else use
    out["n"] = len(use)
    for key in use[0]:
        values = [s[key] for s in use]
        out[key] = dict(min=min(values), med=statistics.median(values), max=max(values))
    out["mean_len"] = statistics.mean(s["new_tokens"] for s in use) / ROWS
    out["gen_tok_s"] = statistics.median(s["new_tokens"] / s["gen"] for s in use)
    out["upd_tok_s"] = statistics.median((ROWS * PLEN + s["new_tokens"]) / s["update"] for s in use)
    out["first_steps_s"] = [round(s["step"], 3) for s in steps[:skip]]
    out["rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    out |= extra
    line = json.dumps(out)
    print("RESULT " + line, flush=True)
    if path := os.environ.get("BENCH_OUT"):
        with open(path, "a") as f:
            f.write(line + "\n")
    return out
