"""Seconds per GRPO step on the four workloads of `peers/workload.py`, against this machine's floor and other libraries.

    python scripts/bench_step.py                                  W1, tiny, without and with a KL term
    python scripts/bench_step.py --size small --workload W2 --json
    python scripts/bench_step.py --workload W1 W2 W3 W4 --peers DIR --rounds 3

`--peers DIR` names a folder that `peers/setup.sh DIR` filled: TRL and Tunix then run between our runs, and ratios of
medians are printed. Floors: matrix products at the rate measured in the same run, for what must be computed (a prompt
once for its group); decoding reads weights and caches once a token at the measured copy bandwidth, or computes at the
measured rate of its own matrix shapes, whichever takes longer; AdamW moves 28 bytes a parameter.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "peers"))

import workload as w

from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.engine import learner
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Context, Prompts, PyTree, Sampling
from jaxrl_llm.updates.optimizer import adamw

W4_SEEDS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    prompts: int = 8
    prompt_tokens: int = 32
    new_tokens: int = 64
    ends: float | None = None
    seeds: int = 1
    slots: int | None = None
    peers_env: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.prompts * w.GROUP


WORKLOADS = {
    "W1": Workload(),
    "W2": Workload(prompt_tokens=512, peers_env={"BENCH_PLEN": "512"}),
    "W3": Workload(prompts=32, new_tokens=128, ends=4 / 128, slots=64, peers_env={"BENCH_TAIL": "1"}),
    "W4": Workload(new_tokens=16, seeds=W4_SEEDS, peers_env={"BENCH_NEW": "16"}),
}


def config(size: str, dtype: str, remat: str) -> TransformerConfig:
    c = w.SIZES[size]
    return TransformerConfig(
        vocab_size=c["vocab"],
        hidden_size=c["hidden"],
        intermediate_size=c["inter"],
        num_hidden_layers=c["layers"],
        num_attention_heads=c["heads"],
        num_key_value_heads=c["kv_heads"],
        head_dim=c["head_dim"],
        rope_theta=float(w.ROPE_THETA),
        rms_norm_eps=w.NORM_EPS,
        qkv_bias=True,
        dtype=jnp.dtype(dtype),
        remat=None if remat == "none" else remat,
    )


def ending_at_random(model: Model, eos: int, chance: float) -> Model:
    """The model with a fixed probability of EOS at every token: geometric lengths."""

    def logits(params: PyTree, hidden: Array) -> Array:
        z = model.logits(params, hidden).at[..., eos].set(-jnp.inf)
        rest = jax.nn.logsumexp(z, axis=-1)
        return z.at[..., eos].set(rest + jnp.log(chance) - jnp.log1p(-chance))

    return dataclasses.replace(model, logits=logits)


def task(work: Workload, vocab: int, eos: int) -> Task:
    """Random prompts of 5/8 to full length, one reward for every token 7: as the peers' workload, in the graph."""
    eighths = jnp.array([32, 20, 22, 24, 26, 28, 30, 31]) * work.prompt_tokens // 32

    def draw(key: Array, n: int) -> Prompts:
        tokens = jax.random.randint(key, (n, work.prompt_tokens), 1, min(vocab, 96))
        mask = jnp.arange(work.prompt_tokens) < eighths[jnp.arange(n) % 8][:, None]
        context = Context(tokens=jnp.where(mask, tokens, 0), mask=mask)
        return Prompts(context=context, index=jnp.arange(n), target=())

    return Task(
        name="bench",
        tokenizer=SimpleNamespace(eos_token_id=eos, pad_token_id=0),
        rows=1,
        prompt_length=work.prompt_tokens,
        response_length=work.new_tokens,
        test=lambda n: draw(jax.random.key(0), n),
        draw=draw,
        verify=lambda prompts, tokens, mask: ((tokens == 7) & mask).sum(-1).astype(jnp.float32),
        grade=lambda prompts, completions, **_: [0.0] * len(completions),
        columns=lambda prompts: {},
    )


def measure(name: str, size: str, kl: float, repeats: int, dtype: str, remat: str, sizes: int = 1) -> dict[str, Any]:
    """One workload, ours."""
    work, c = WORKLOADS[name], config(size, dtype, remat)
    model, eos = transformer(c), w.eos_id(size, tail=work.ends is not None)
    model = model if work.ends is None else ending_at_random(model, eos, work.ends)
    policy = language_model(model, slots=work.slots, sizes=sizes)
    parts = learner(
        grpo(group_size=w.GROUP, kl=kl),
        policy=policy,
        task=task(work, c.vocab_size, eos),
        optimizer=adamw(w.LR, max_norm=w.CLIP),
        prompts_per_step=work.prompts,
    )
    traces = 0

    def step(state: Any) -> Any:
        nonlocal traces
        traces += 1
        return parts.step(state)

    many = work.seeds > 1
    init = jax.vmap(parts.init) if many else parts.init
    keys = jax.random.split(jax.random.key(0), work.seeds) if many else jax.random.key(0)
    state = jax.jit(init)(keys)
    start = time.perf_counter()
    program = jax.jit(jax.vmap(step) if many else step, donate_argnums=0).lower(state).compile()
    compile_seconds = time.perf_counter() - start

    times, new_tokens = [], []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(program(state))
        times.append(time.perf_counter() - start)
        new_tokens.append(float(metrics["tokens/generated"].sum()))
    times, new_tokens = times[2:], new_tokens[2:]

    generate = _generation(policy, parts, state, work, eos, many)
    generation = [_seconds(generate) for _ in range(repeats + 2)][2:]
    gen, total = statistics.median(generation), statistics.median(times)
    memory = program.memory_analysis()
    length = statistics.mean(new_tokens) / (work.rows * work.seeds)
    updated = work.seeds * (work.prompts * (work.prompt_tokens - 1) + work.rows * work.new_tokens)
    out = {
        "workload": name, "size": size, "kl": kl, "dtype": dtype, "seeds": work.seeds, "slots": work.slots,
        "sizes": sizes,
        "step": _spread(times), "generation": _spread(generation), "update": total - gen,
        "mean_length": length,
        "generated_tokens_per_s": statistics.mean(new_tokens) / total,
        "generated_tokens_per_s_of_generation": statistics.mean(new_tokens) / gen,
        "updated_tokens_per_s": updated / (total - gen),
        "compile_s": compile_seconds, "traces": traces,
        "temporary_MB": memory.temp_size_in_bytes / 1e6, "state_MB": memory.argument_size_in_bytes / 1e6,
    }  # fmt: skip
    floor = floors(work, size, bool(kl), length, rates(size, work.rows * work.seeds))
    times_floor = {"generation": gen, "update": total - gen, "step": total}
    return out | {"floor": floor} | {f"{k}_over_floor": v / floor[k] for k, v in times_floor.items()}


def _generation(policy: Any, parts: Any, state: Any, work: Workload, eos: int, many: bool) -> Callable[[], Any]:
    """The rollouts of a step alone."""
    problem = task(work, policy.vocab, eos)

    def rollouts(params: PyTree, key: Array) -> Any:
        prompts = problem.draw(key, work.prompts)  # type: ignore[misc]
        context = jax.tree.map(lambda x: x[:, None], prompts.context)
        keys = jax.random.split(key, (work.prompts, w.GROUP))
        return policy.sample(
            params, keys, context, Sampling(temperature=jnp.float32(1.0)), length=work.new_tokens, eos=(eos,), stop=()
        )

    run = jax.jit(jax.vmap(rollouts) if many else rollouts)
    keys = jax.random.split(jax.random.key(1), work.seeds) if many else jax.random.key(1)
    return functools.partial(run, state.params["policy"], keys)


def rates(size: str, rows: int) -> dict[str, float]:
    """FLOP/s of large matrix products and of decoding's own shapes, bytes/s of a copy, on this machine, now."""
    c = w.SIZES[size]
    wide = jnp.ones((4096, c["hidden"])), jnp.ones((c["hidden"], c["inter"]))
    thin = jnp.ones((rows, c["hidden"])), jnp.ones((c["hidden"], c["inter"]))
    large = jnp.ones((2048, 2048)), jnp.ones((2048, 2048))
    product = jax.jit(jnp.dot)

    def flops(a: Array, b: Array) -> float:
        return 2 * a.shape[0] * a.shape[1] * b.shape[1] / _best(lambda: product(a, b))

    buffer, copy = jnp.ones(4 << 20), jax.jit(lambda x: x + 1, donate_argnums=0)
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        buffer = copy(buffer).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return {
        "matrix": max(flops(*wide), flops(*large)), "decode": flops(*thin), "bytes": 2 * buffer.nbytes / best,
    }  # fmt: skip


def floors(work: Workload, size: str, kl: bool, length: float, rate: dict[str, float]) -> dict[str, float]:
    """Seconds below which no program can be, sharing each prompt within its group and ending each row at its EOS."""
    c = w.SIZES[size]
    body, head = w.params(size)
    per_pair = 4 * c["heads"] * c["head_dim"] * c["layers"]
    prompt = work.prompt_tokens * 0.83  # mean of the lengths above
    new = work.rows * length
    prefill = 2 * body * work.prompts * prompt + per_pair * work.prompts * prompt**2 / 2
    attend = per_pair * new * (prompt + length / 2)
    decode = (2 * (body + head) * new + attend) / rate["decode"]
    cached = 8 * c["kv_heads"] * c["head_dim"] * c["layers"]
    moved = 4 * (body + head) + cached * (work.prompts * prompt + work.rows * length / 2)
    generation = prefill / rate["matrix"] + max(decode, length * moved / rate["bytes"])
    forward = prefill + 2 * (body + head) * new + attend
    update = (3 + kl) * forward / rate["matrix"] + 28 * (body + head) / rate["bytes"]
    many = {"generation": generation * work.seeds, "update": update * work.seeds}
    return many | {"step": sum(many.values()), "matrix_gflops": rate["matrix"] / 1e9,
                   "decode_gflops": rate["decode"] / 1e9, "copy_gb_per_s": rate["bytes"] / 1e9}  # fmt: skip


def peer(folder: Path, name: str, workload: str, size: str, kl: float, steps: int) -> dict[str, Any] | None:
    """One run of a peer's script in its own environment; None (and its last words) if it failed."""
    python = folder / name / "bin" / "python"
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHONPATH"))}
    env |= WORKLOADS[workload].peers_env | {"BENCH_CKPT": str(folder / "ckpt")}
    command = [str(python), str(HERE / "peers" / f"{name}_grpo.py"), "--size", size, "--beta", str(kl)]
    if WORKLOADS[workload].ends is not None:
        command += ["--tail"]
    run = subprocess.run([*command, "--steps", str(steps)], env=env, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        print(f"{name} failed: {(run.stderr or run.stdout)[-400:]}", file=sys.stderr)
        return None
    return dict(json.loads(lines[-1].removeprefix("RESULT ")))


def _spread(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times), "n": len(times)}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _best(call: Callable[[], Any]) -> float:
    _seconds(call)
    return min(_seconds(call) for _ in range(15))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workload", nargs="+", default=["W1"], choices=sorted(WORKLOADS))
    p.add_argument("--size", default="tiny", choices=sorted(w.SIZES), help="W4 is always of size research")
    p.add_argument("--kl", nargs="+", type=float, default=[0.0, 0.04])
    p.add_argument("--repeats", type=int, default=7, help="timed steps a round, after two that are not")
    p.add_argument("--rounds", type=int, default=1, help="ours and each peer in turn, so often")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--remat", default=TransformerConfig.remat or "none", help="what the update keeps; none: everything")
    p.add_argument("--sizes", type=int, default=1, help="packing of the update, see `language_model`")
    p.add_argument("--peers", type=Path, help="folder made by peers/setup.sh")
    p.add_argument("--json", action="store_true", help="one JSON object a line")
    args = p.parse_args()

    for name in args.workload:
        size = "research" if name == "W4" else args.size
        for kl in args.kl:
            ours, others = [], {"trl": [], "tunix": []}  # type: ignore[var-annotated]
            for _ in range(args.rounds):
                ours.append(measure(name, size, kl, args.repeats, args.dtype, args.remat, args.sizes))
                for other in others if args.peers else ():
                    if found := peer(args.peers, other, name, size, kl, args.repeats + 2):
                        others[other].append(found)
            report(ours, others, as_json=args.json)


def report(ours: list[dict[str, Any]], others: dict[str, list[dict[str, Any]]], *, as_json: bool) -> None:
    """The round with the median step, and ratios of medians over all rounds."""
    middle = sorted(ours, key=lambda r: r["step"]["median"])[len(ours) // 2]
    result = middle | {"rounds": len(ours), "peers": {}}
    for name, runs in others.items():
        if runs:
            step = statistics.median(r["step"]["med"] for r in runs)
            ratio = step * middle["seeds"] / middle["step"]["median"]
            result["peers"][name] = {"step": step, "times_ours": ratio}
            for part in ("gen", "update"):
                result["peers"][name][part] = statistics.median(r[part]["med"] for r in runs)
            if middle["workload"] == "W3":
                rate = statistics.median(r["gen_tok_s"] for r in runs)
                ours_rate = middle["generated_tokens_per_s_of_generation"]
                result["peers"][name] |= {"gen_tok_s": rate, "tokens_per_s_ours_over_theirs": ours_rate / rate}
    if as_json:
        print(json.dumps(result), flush=True)
        return
    s, f = result["step"], result["floor"]
    print(
        f"{result['workload']} {result['size']} kl={result['kl']}: "
        f"step {s['median']:.3f} s [{s['min']:.3f}, {s['max']:.3f}] "
        f"= generation {result['generation']['median']:.3f} ({result['generation_over_floor']:.2f} x floor) "
        f"+ update {result['update']:.3f} ({result['update_over_floor']:.2f} x floor); "
        f"{result['generated_tokens_per_s']:,.0f} generated, {result['updated_tokens_per_s']:,.0f} updated tokens/s; "
        f"compile {result['compile_s']:.1f} s, {result['traces']} trace, temporaries {result['temporary_MB']:.0f} MB; "
        f"machine {f['matrix_gflops']:.0f} GFLOP/s, {f['decode_gflops']:.0f} decoding, {f['copy_gb_per_s']:.0f} GB/s"
    )
    for name, r in result["peers"].items():
        extra = f", tokens/s x {r['tokens_per_s_ours_over_theirs']:.2f}" if "gen_tok_s" in r else ""
        print(
            f"    {name}: step {r['step']:.3f} s (gen {r['gen']:.3f}, update {r['update']:.3f}) "
            f"= {r['times_ours']:.2f} x ours{extra}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
