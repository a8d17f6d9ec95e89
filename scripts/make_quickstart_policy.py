"""Makes the small policy that ships with the package: `python scripts/make_quickstart_policy.py`.

Supervised training on column addition worked out step by step, in which most carries are forgotten: the policy learns
the form and the sums of digits, and both ways, but mostly takes the wrong one. Choosing is left to reinforcement
learning. Everything random follows from `--seed`; held-out problems are never trained on.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from jax import Array

from jaxrl_llm import tasks
from jaxrl_llm.evaluate import evaluator
from jaxrl_llm.models import hf
from jaxrl_llm.models.model import Model, inputs_of, prefix_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.tasks.arithmetic import worked
from jaxrl_llm.tasks.characters import EOS, encode
from jaxrl_llm.tasks.task import Task, pad_tokens
from jaxrl_llm.types import Prompts, PyTree, Sampling, masked

POLICY = TransformerConfig(
    vocab_size=64,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Supervised training of the policy that the quickstart starts from."""

    out: Path = Path(__file__).parents[1] / "jaxrl_llm" / "data" / "quickstart"
    """Folder to write: config.json, model.safetensors, tokenizer files, MODEL_CARD.md."""
    digits: int = 4
    """Digits of each of the two numbers."""
    right: float = 0.3
    """How often a carry is remembered, independently in each column."""
    steps: int = 1000
    """Optimiser steps."""
    batch: int = 32
    """Problems per step."""
    learning_rate: float = 3e-3
    """Peak of AdamW's learning rate; linear warm-up, then cosine decay to zero."""
    seed: int = 0
    """Decides everything random."""


def examples(task: Task, prompts: Prompts, rng: np.random.Generator, right: float) -> tuple[np.ndarray, np.ndarray]:
    """Worked responses `[B T]` with their masks; EOS included."""
    texts = []
    for operands in np.asarray(prompts.target["operands"]):
        texts.append(worked(rng, *(int("".join(map(str, row))) for row in operands), right=right))
    tokens, mask, cut = pad_tokens([[*encode(text), EOS] for text in texts], task.response_length, "right")
    assert not cut.any()
    return tokens, mask


def cross_entropy(model: Model, params: PyTree, prompts: Prompts, tokens: Array, mask: Array) -> Array:
    """Mean over response tokens, nats."""
    prefix, offset, last = prefix_of(prompts.context)
    tokens, mask = tokens[:, None], mask[:, None]
    hidden = model.hidden(params, prefix, offset, inputs_of(last, tokens, mask), mask)
    losses = optax.softmax_cross_entropy_with_integer_labels(model.logits(params, hidden), tokens)
    return masked(mask, losses).sum() / mask.sum()


def train(config: Config) -> tuple[Task, PyTree]:
    """The task and the trained parameters."""
    task = tasks.load("arithmetic", digits=config.digits)
    model = transformer(POLICY)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, config.steps // 20, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: PyTree, state: Any, *data: Any) -> tuple[PyTree, Any, Array]:
        loss, gradient = jax.value_and_grad(functools.partial(cross_entropy, model))(params, *data)
        update, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    draw = jax.jit(task.draw, static_argnums=1)
    held_out = set(problems_of(task.test(8192)))
    start, problems = jax.random.split(jax.random.key(config.seed))
    rng = np.random.default_rng(config.seed)
    params = model.init(start)
    state = optimizer.init(params)
    clock, losses = time.perf_counter(), []
    for i in range(config.steps):
        prompts = draw(jax.random.fold_in(problems, i), config.batch)
        if shared := held_out & set(problems_of(prompts)):
            raise RuntimeError(f"held-out problems among the training problems: {shared}")
        params, state, loss = step(params, state, prompts, *examples(task, prompts, rng, config.right))
        losses.append(loss)
        if (i + 1) % 50 == 0:
            mean, seconds = np.mean(losses[-50:]), time.perf_counter() - clock
            print(f"step {i + 1:>5}/{config.steps}  loss {mean:.4f} nats  {seconds:.0f} s", flush=True)
    return task, params


def problems_of(prompts: Prompts) -> list[tuple[bytes, ...]]:
    """The operands of each prompt, in an order that does not depend on how they were written."""
    return [tuple(sorted(row.tobytes() for row in operands)) for operands in np.asarray(prompts.target["operands"])]


def measure(task: Task, params: PyTree) -> dict[str, float]:
    """What the policy does on held-out problems, greedily and at temperature 1."""
    policy = language_model(transformer(POLICY))
    greedy = evaluator(policy, task, problems=2048)(params)
    prompts = task.test(256)
    keys = jax.random.split(jax.random.key(1), (256, 8))
    context = jax.tree.map(lambda x: x[:, None], prompts.context)
    eos = (task.tokenizer.eos_token_id,)
    samples = jax.jit(functools.partial(policy.sample, length=task.response_length, eos=eos))(
        params, keys, context, Sampling()
    )
    reward = task.verify(prompts, samples.tokens, samples.mask)
    return {
        "greedy accuracy": greedy.accuracy,
        "mean reward at temperature 1": float(reward.mean()),
        "groups of 8 with right and wrong answers": float((reward.max(-1) > reward.min(-1)).mean()),
        "responses cut off at temperature 1": float(samples.truncated.mean()),
    }


CARD = """# Quickstart policy

A decoder of {millions:.2f} M parameters (Llama architecture, {vocab} characters as tokens) that adds two numbers of
{digits} digits column by column, `347+586=` -> `7+6=13;4+8+1=13;3+5+1=9>933`, and mostly forgets to carry. It exists to
be corrected by reinforcement learning in a few minutes on a laptop: `bash scripts/quickstart.sh`.

Made by `python scripts/make_quickstart_policy.py` (seed {seed}, {steps} steps of {batch} problems, AdamW, peak learning
rate {learning_rate:g}): supervised training on generated problems whose worked responses remember each carry with
probability {right:g}. Held-out problems (one in eight, by a hash of the operands) were not trained on.

On held-out problems:

{table}

No data of people was used. Licence: Apache-2.0.
"""


def card(config: Config, params: PyTree, measured: dict[str, float]) -> str:
    """The model card."""
    return CARD.format(
        millions=sum(x.size for x in jax.tree.leaves(params)) / 1e6,
        vocab=POLICY.vocab_size,
        table="\n".join(["| | |", "|---|---|"] + [f"| {name} | {value:.3f} |" for name, value in measured.items()]),
        **dataclasses.asdict(config),
    )


def main(config: Config) -> None:
    """Trains, measures, writes."""
    task, params = train(config)
    measured = measure(task, params)
    for name, value in measured.items():
        print(f"{name}: {value:.3f}")
    hf.save(config.out, POLICY, jax.device_get(params), tokenizer=task.tokenizer)
    (config.out / "MODEL_CARD.md").write_text(card(config, params, measured))
    for path in config.out.iterdir():
        path.chmod(0o644)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
