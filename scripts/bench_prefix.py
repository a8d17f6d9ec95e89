"""FLOPs and seconds of scoring a group with its prompt encoded once, against once for each response.

    python scripts/bench_prefix.py [--prefix 64 256 1024] [--group 2 8 16] [--response 64] [--repeats 5] [--json]

One prompt, responses of equal length, no padding, one layer: XLA counts the body of a loop once, and layers are alike.
FLOPs are the compiled program's `cost_analysis()`. The two layouts take turns within a run; seconds are medians, on the
clock and as CPU time of all threads, which other programs on the machine disturb less.
The prompt has one token more than its prefix: its last token is the first input of every response.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import Policy, language_model
from jaxrl_llm.types import POLICY, Context, Prompts, PyTree, Rollouts, Sampling

# Nothing is computed twice: a gradient is then three forward passes in both layouts, and one formula holds for both.
MODEL = TransformerConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    remat=None,
)
LAYOUTS = {"shared": True, "separate": False}


def position_wise(prefix: int, response: int, group: int) -> float:
    """Tokens encoded, shared over separate (2506.05433)."""
    return (prefix + group * response) / (group * (prefix + response))


def attention(prefix: int, response: int, group: int) -> float:
    """Pairs of tokens that attend, shared over separate (2506.05433)."""
    return (prefix**2 + group * response * (2 * prefix + response)) / (group * (prefix + response) ** 2)


def floor(c: TransformerConfig, prefix: int, response: int, group: int, *, masked_pairs: bool = False) -> float:
    """FLOPs of matrix products, shared over separate: the paper's two ratios, weighted by what this model spends.

    Args:
      masked_pairs: whether pairs that the causal mask hides are computed as well, as by attention on whole blocks
        (prefix on prefix, response on prefix, response on itself). The paper counts the pairs that attend.
    """
    return matmul_flops(c, prefix, response, group, masked_pairs, shared=True) / matmul_flops(
        c, prefix, response, group, masked_pairs, shared=False
    )


def matmul_flops(
    c: TransformerConfig, prefix: int, response: int, group: int, masked_pairs: bool, *, shared: bool
) -> float:
    """A forward pass on one group; logits, of responses only, cost the same in both layouts."""
    copies, half = 1 if shared else group, 1.0 if masked_pairs else 0.5
    width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = c.hidden_size * (2 * width + 2 * kv_width + 3 * c.intermediate_size)
    tokens = copies * prefix + group * response
    pairs = half * copies * prefix**2 + group * response * (prefix + half * response)
    logits = c.vocab_size * c.hidden_size * group * response
    return c.num_hidden_layers * (2 * layer * tokens + 4 * width * pairs) + 2 * logits


def rollouts(c: TransformerConfig, prefix: int, response: int, group: int) -> Rollouts:
    """Random tokens."""
    keys = jax.random.split(jax.random.key(0), 2)
    prompt = jax.random.randint(keys[0], (1, 1, prefix + 1), 0, c.vocab_size)
    context = Context(tokens=prompt, mask=jnp.ones(prompt.shape, bool))
    tokens = jax.random.randint(keys[1], (1, group, response), 0, c.vocab_size)
    one, zeros = jax.tree.map(lambda x: x[:, 0], context), jnp.zeros(tokens.shape)
    return Rollouts(
        prompts=Prompts(context=one, index=jnp.zeros(1, jnp.int32), target=()),
        context=context,
        tokens=tokens,
        mask=jnp.ones(tokens.shape, bool),
        role=jnp.full(tokens.shape, POLICY, jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros(tokens.shape[:2], bool),
        sampling=Sampling(temperature=jnp.ones(tokens.shape[:2])),
    )


def total(policy: Policy, params: PyTree, data: Rollouts) -> Array:
    """The sum of the responses' log-probs."""
    logp = policy.score(params, data, frozenset({"logp"})).logp
    assert logp is not None
    return logp.sum()


def measure(
    prefix: int, group: int, response: int = 64, repeats: int = 5, at_least: float = 4.0
) -> list[dict[str, Any]]:
    """One prefix length and group size: a row for the forward pass, a row for the gradient.

    Args:
      prefix: tokens before the last one of the prompt.
      group: responses.
      response: tokens of each.
      repeats: how often each layout is timed, or more: until that took `at_least` seconds.
      at_least: seconds.
    """
    model, data = transformer(MODEL), rollouts(MODEL, prefix, response, group)
    params = jax.jit(model.init)(jax.random.key(1))
    rows = []
    for what in ("forward", "gradient"):
        programs = {}
        seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        cpu: dict[str, list[float]] = {name: [] for name in LAYOUTS}
        for name, share in LAYOUTS.items():
            of = functools.partial(total, language_model(model, share_prefix=share))
            run = of if what == "forward" else jax.grad(of)
            programs[name] = jax.jit(run).lower(params, data).compile()
            jax.block_until_ready(programs[name](params, data))
        while len(seconds["shared"]) < repeats or sum(map(sum, seconds.values())) < at_least:
            for name, program in programs.items():
                start, start_cpu = time.perf_counter(), time.process_time()
                jax.block_until_ready(program(params, data))
                seconds[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
        flops = {name: float(program.cost_analysis()["flops"]) for name, program in programs.items()}
        wall, used = ({name: statistics.median(x) for name, x in y.items()} for y in (seconds, cpu))
        rows.append(
            {
                "pass": what, "prefix": prefix, "group": group, "response": response,
                "formula": floor(MODEL, prefix, response, group),
                "formula_with_masked_pairs": floor(MODEL, prefix, response, group, masked_pairs=True),
                "flops_ratio": flops["shared"] / flops["separate"], "time_ratio": wall["shared"] / wall["separate"],
                "cpu_ratio": used["shared"] / used["separate"],
                "flops": flops, "seconds": wall, "cpu_seconds": used, "repeats": len(seconds["shared"]),
                "temporary_MB": {n: p.memory_analysis().temp_size_in_bytes / 1e6 for n, p in programs.items()},
            }
        )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    header = ["pass", "prefix", "group", "FLOPs, separate", "FLOPs ratio", "formula", "formula, masked pairs too"]
    header += ["seconds, separate", "seconds, shared", "time ratio", "CPU time ratio", "memory ratio"]
    cells = [
        [
            row["pass"],
            str(row["prefix"]),
            str(row["group"]),
            f"{row['flops']['separate'] / 1e9:.2f} G",
            f"{row['flops_ratio']:.3f}",
            f"{row['formula']:.3f}",
            f"{row['formula_with_masked_pairs']:.3f}",
            f"{row['seconds']['separate']:.4f}",
            f"{row['seconds']['shared']:.4f}",
            f"{row['time_ratio']:.3f}",
            f"{row['cpu_ratio']:.3f}",
            f"{row['temporary_MB']['shared'] / row['temporary_MB']['separate']:.3f}",
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(x)} |" for x in (header, ["---"] * len(header), *cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--group", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--response", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = [row for p in args.prefix for g in args.group for row in measure(p, g, args.response, args.repeats)]
    print(json.dumps(rows, indent=1) if args.json else table(rows))


if __name__ == "__main__":
    main()
