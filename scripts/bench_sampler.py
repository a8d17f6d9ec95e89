"""Seconds per generation, against what this machine could do: `python scripts/bench_sampler.py [--json]`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.model import Model, inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.rollouts.distribution import log_prob
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, PyTree, Samples, Sampling, record

# hidden, layers, heads, key-value heads, head size, intermediate, vocabulary
SIZES = {
    "tiny": (256, 4, 4, 2, 64, 704, 512),
    "small": (896, 4, 14, 2, 64, 4864, 32_000),
    "research": (64, 2, 2, 1, 32, 176, 512),
}
EOS = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    prompts: int = 8
    prompt_tokens: int = 32
    rollouts: int = 8
    new_tokens: int = 64
    ends: float | None = None  # the chance of EOS at each token; None: no EOS
    slots: int | None = None
    filtered: bool = False  # top-k 50 and top-p 0.9


WORKLOADS = {
    "fixed": Workload(),
    "filtered": Workload(filtered=True),
    "prompt512": Workload(prompt_tokens=512),
    "tail": Workload(prompts=32, new_tokens=128, ends=4 / 128),
    "tail, 32 slots": Workload(prompts=32, new_tokens=128, ends=4 / 128, slots=32),
    "tail, 64 slots": Workload(prompts=32, new_tokens=128, ends=4 / 128, slots=64),
    "tail, 128 slots": Workload(prompts=32, new_tokens=128, ends=4 / 128, slots=128),
}


def config(size: str, dtype: str) -> TransformerConfig:
    hidden, layers, heads, shared, dim, intermediate, vocab = SIZES[size]
    return TransformerConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        head_dim=dim,
        dtype=jnp.dtype(dtype),
    )


def ending_at_random(model: Model, chance: float) -> Model:
    """The model with the probability of EOS set to `chance`, so that lengths are geometric: a long tail."""

    def logits(params: PyTree, hidden: Array) -> Array:
        z = model.logits(params, hidden).at[..., EOS].set(-jnp.inf)
        rest = jax.nn.logsumexp(z, axis=-1)
        return z.at[..., EOS].set(rest + jnp.log(chance) - jnp.log1p(-chance))

    return dataclasses.replace(model, logits=logits)


def seconds(call: Callable[[], Any], repeats: int) -> list[float]:
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return times


def rates(dtype: str, rows: int) -> dict[str, float]:
    """What this machine does: FLOP/s of a product of the sampler's shape, bytes/s read and written by a copy."""
    n = 10
    a, b = jnp.ones((rows, 1024), dtype), jnp.ones((1024, 1024), dtype)
    product = jax.jit(lambda a, b: jax.lax.fori_loop(0, n, lambda _, x: (x @ b) * jnp.asarray(1e-3, dtype), a))
    x = jnp.ones(1 << 24, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return {
        "flops": n * 2 * rows * 1024 * 1024 / min(seconds(lambda: product(a, b), 20)),
        "bytes": 2 * x.nbytes / min(seconds(lambda: copy(x), 10)),
    }


def floor(c: TransformerConfig, w: Workload, steps: int, dtype: str) -> dict[str, float]:
    """The larger of arithmetic and traffic, each at this machine's rate: weights and caches read once a step."""
    rows = w.slots or w.prompts * w.rollouts
    rate, size = rates(dtype, rows), jnp.dtype(dtype).itemsize
    heads = c.head_dim * (2 * c.num_attention_heads + 2 * c.num_key_value_heads)
    weights = c.num_hidden_layers * c.hidden_size * (heads + 3 * c.intermediate_size) + c.vocab_size * c.hidden_size
    prefixes = rows if w.slots else w.prompts
    kept = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    cache = kept * (prefixes * w.prompt_tokens + rows * w.new_tokens // 2)
    mixed = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * (w.prompt_tokens + w.new_tokens // 2)
    prefill = w.prompts * w.prompt_tokens * 2 * weights
    arithmetic = (steps * rows * (2 * weights + mixed) + prefill) / rate["flops"]
    traffic = steps * size * (weights + cache) / rate["bytes"]
    return {"arithmetic": arithmetic, "traffic": traffic, "gflops": rate["flops"] / 1e9, "gbytes": rate["bytes"] / 1e9}


@record
class Inputs:
    params: PyTree
    keys: Array
    context: Context
    sampling: Sampling


def inputs(model: Model, w: Workload) -> Inputs:
    shape = (w.prompts, 1, w.prompt_tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 2, model.vocab)
    filters = {"top_k": jnp.array(50), "top_p": jnp.array(0.9)} if w.filtered else {}
    return Inputs(
        params=model.init(jax.random.key(0)),
        keys=jax.random.split(jax.random.key(2), (w.prompts, w.rollouts)),
        context=Context(tokens=tokens, mask=jnp.ones(shape, bool)),
        sampling=Sampling(temperature=jnp.array(1.0), **filters),
    )


def gap(model: Model, given: Inputs, samples: Samples) -> float:
    """The mean distance of the sampled log-probs from those scoring recomputes, in nats."""
    prefix, offset, last = prefix_of(jax.tree.map(lambda x: x[:, 0], given.context))
    hidden = model.hidden(given.params, prefix, offset, inputs_of(last, samples.tokens, samples.mask), samples.mask)
    logp, _ = log_prob(model.logits(given.params, hidden), samples.tokens, given.sampling)
    return float(jnp.abs(jnp.where(samples.mask, logp - samples.logp, 0)).sum() / samples.mask.sum())


def measure(name: str, size: str, dtype: str, repeats: int) -> dict[str, Any]:
    w, c = WORKLOADS[name], config(size, dtype)
    model = transformer(c)
    model = model if w.ends is None else ending_at_random(model, w.ends)
    given = inputs(model, w)
    ends = () if w.ends is None else (EOS,)
    program = functools.partial(sample, model, length=w.new_tokens, eos=ends, slots=w.slots)
    start = time.perf_counter()
    compiled = jax.jit(program).lower(given.params, given.keys, given.context, given.sampling).compile()
    compile_seconds = time.perf_counter() - start
    run = functools.partial(compiled, given.params, given.keys, given.context, given.sampling)
    times = seconds(run, repeats)
    samples = run()
    lengths = samples.mask.sum(-1)
    tokens, middle = int(lengths.sum()), statistics.median(times)
    steps = int(lengths.max()) if w.slots is None else -(-tokens // w.slots)
    bound = floor(c, w, steps, dtype)
    memory = compiled.memory_analysis()
    return {
        "workload": name,
        "size": size,
        "dtype": dtype,
        "median_s": middle,
        "min_s": min(times),
        "max_s": max(times),
        "tokens_per_s": tokens / middle,
        "tokens": tokens,
        "mean_length": tokens / lengths.size,
        "compile_s": compile_seconds,
        "temporary_mb": memory.temp_size_in_bytes / 2**20 if memory else None,
        "log_prob_gap": gap(model, given, samples),
        "floor": bound,
        "times_floor": middle / max(bound["arithmetic"], bound["traffic"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["research", "tiny"])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of a table")
    args = parser.parse_args()
    if not args.json:
        heads = "".join(f"{x:>9}" for x in ("median", "min", "max", "tok/s", "x floor", "gap"))
        print(f"{'size':9} {'dtype':9} {'workload':16}{heads}")
    for size in args.size:
        for dtype in args.dtype:
            for name in args.workload:
                row = measure(name, size, dtype, args.repeats)
                if args.json:
                    print(json.dumps(row), flush=True)
                else:
                    print(
                        f"{size:9} {dtype:9} {name:16} {row['median_s']:8.3f} {row['min_s']:8.3f} {row['max_s']:8.3f} "
                        f"{row['tokens_per_s']:8.0f} {row['times_floor']:8.2f} {row['log_prob_gap']:9.1e}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
