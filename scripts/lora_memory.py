"""What a run keeps, and what a gradient needs besides: all weights trained, adapters, adapters on a quantised base.

    python scripts/lora_memory.py [--model qwen2.5-0.5b] [--rank 16] [--layers N] [--tokens 512] [--compile]

Kept: the shapes of the state of GRPO with a KL term, at their bits; nothing of that size is made. With `--compile`, the
gradient of the policy's log-probabilities for 4 responses to one prompt, compiled for this machine, by XLA's
`memory_analysis`: what it is given and what it needs while it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl_llm import algorithms, tasks
from jaxrl_llm.engine import learner
from jaxrl_llm.models import sizes
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.model import Model
from jaxrl_llm.models.transformer import transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.types import Context, PyTree

WAYS: dict[str, dict[str, Any] | None] = {
    "all weights": None,
    "adapters": {},
    "adapters, int8": {"quantize": "int8"},
    "adapters, nf4": {"quantize": "nf4"},
}


def size(tree: PyTree) -> float:
    """Bytes; 4-bit numbers take half of one."""

    def of(x: Any) -> float:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return 0.0
        bits = jnp.iinfo(x.dtype).bits if jnp.issubdtype(x.dtype, jnp.integer) else 8 * x.dtype.itemsize
        return x.size * bits / 8

    return sum(map(of, jax.tree.leaves(tree)))


def kept(model: Model) -> tuple[float, float]:
    """Bytes of the weights of all roles, and of the optimiser's state."""
    recipe, task = algorithms.load("grpo", group_size=4, kl=0.04), tasks.load("sorting")
    parts = learner(recipe, policy=language_model(model), task=task, prompts_per_step=1)
    state = jax.eval_shape(parts.init, jax.random.key(0))
    return size(state.params), size(state.opt_state)


def gradient(model: Model, tokens: int) -> tuple[int, int]:
    """Bytes of its arguments, and of what it needs besides."""
    params = jax.eval_shape(model.init, jax.random.key(0))
    adapter = model.adapter
    parts = (None, params) if adapter is None else jax.eval_shape(lambda p: (adapter.base(p), adapter.own(p)), params)
    prefix = Context(tokens=jnp.zeros((1, 64), jnp.int32), mask=jnp.ones((1, 64), bool))
    inputs, attended = jnp.zeros((1, 4, tokens), jnp.int32), jnp.ones((1, 4, tokens), bool)

    def loss(trained: PyTree, base: PyTree) -> jax.Array:
        now = trained if adapter is None else adapter.join(base, trained)
        return model.hidden(now, prefix, jnp.array([64]), inputs, attended).astype(jnp.float32).mean()

    found = jax.jit(jax.grad(loss)).lower(parts[1], parts[0]).compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b", choices=sizes.MODELS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, help="only the first of them")
    parser.add_argument("--tokens", type=int, default=512, help="of a response")
    parser.add_argument("--compile", action="store_true", help="the gradient's memory too")
    a = parser.parse_args()
    config = dataclasses.replace(sizes.config(a.model, dtype=jnp.bfloat16), scan_decode=True)
    config = config if a.layers is None else config.first_layers(a.layers)
    make = functools.partial(lora, transformer(config), rank=a.rank, alpha=2.0 * a.rank)
    columns = ["what is trained", "weights of all roles", "optimiser", *["gradient: given", "besides"] * a.compile]
    print(f"{a.model}, {config.num_hidden_layers} layers, rank {a.rank}, bfloat16, GB\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, options in WAYS.items():
        model = transformer(config) if options is None else make(**options)
        row = [*kept(model), *(gradient(model, a.tokens) if a.compile else ())]
        print(f"| {name} | {' | '.join(f'{x / 1e9:.3f}' for x in row)} |", flush=True)


if __name__ == "__main__":
    main()
