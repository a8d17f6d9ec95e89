"""PCL: prompt curriculum learning."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.prompts.choose import highest, kept, take
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Context, Problem, Prompts, Stage, masked

Value = dict[str, Array]  # a linear model's weights: of tokens [V], of prompts [P], and a constant []


def undecided(problem: Problem) -> Value:
    """Every prompt is expected to be solved half of the time."""
    return {"token": jnp.zeros(problem.vocab), "prompt": jnp.zeros(problem.rows), "constant": jnp.full((), 0.5)}


def expected(value: Value, context: Context, index: Array) -> Array:
    """The pass rate a prompt is expected to have, from the shares of its tokens and what is left over for it, `[]`."""
    weights = value["token"][jnp.where(context.mask, context.tokens, 0)]
    return value["constant"] + value["prompt"][index] + masked_mean(weights, context.mask)


def error(value: Value, prompt: Prompts, target: Array) -> Array:
    """Half the squared difference of the expected and the observed pass rate, `[]`."""
    return jnp.square(expected(value, prompt.context, prompt.index) - target) / 2


def regressed(value: Value, seen: tuple[Prompts, Array, Array], *, rate: float | Array) -> tuple[Value, None]:
    """One gradient step on the error of one prompt: `(prompt, its pass rate [], whether it has one [])`."""
    prompt, target, known = seen
    slope = jax.grad(error)(value, prompt, target)
    return jax.tree.map(lambda x, s: x - rate * masked(known, s), value, slope), None


def nearest(
    memory: Value, key: Array, prompts: Prompts, *, target: float | Array, candidates: int
) -> tuple[Prompts, Value]:
    """The prompts whose expected pass rate is nearest to `target`."""
    rates = jax.vmap(expected, (None, 0, 0))(memory, prompts.context, prompts.index)
    return take(prompts, highest(-jnp.abs(rates - target), prompts.index, kept(prompts, candidates))), memory


def learnt(memory: Value, batch: Batch, *, rate: float | Array) -> Value:
    """The value after this step's prompts, one after the other, with the mean outcome of each as target."""
    mean, known = masked_mean(batch.outcome, batch.rows, axis=-1), batch.rows.any(-1)
    value: Value
    value, _ = jax.lax.scan(partial(regressed, rate=rate), memory, (batch.prompts, mean, known))
    return value


def pcl(*, group_size: int = 16, target: float = 0.5, candidates: int = 4, value_rate: float = 0.3) -> Algorithm:
    """Mean-centred policy gradient on the prompts whose pass rate a value model expects to be nearest to one half.

    Nothing is rolled out to find them: the model, which sees the prompt alone, learns from the rollouts there are.

    Source: "Prompt Curriculum Learning", 2510.01135.
    Deviations: the value model is not a network of the policy's size but linear, in the shares of a prompt's tokens
      (what prompts have in common) and one weight a prompt (what they have not), and learns by plain gradient steps.
    Limit: with candidates=1 it is `grpo` with kl=None and `per_group(center)`.
    Family: sampling and curricula.

    Args:
      group_size: 16 in the paper.
      target: tau, the pass rate to be near to.
      candidates: k, prompts drawn for each one answered; a step answers `B / k`.
      value_rate: step size of the value model; stable below 2/3.  # not in the paper

    Raises:
      ValueError: no candidates.
    """
    if candidates < 1:
        raise ValueError(f"pcl keeps one prompt of `candidates`, which must be at least 1, got {candidates}")
    return replace(
        grpo(group_size=group_size, kl=None),
        prompt=Stage(
            init=undecided,
            apply=partial(nearest, target=target, candidates=candidates),
            observe=partial(learnt, rate=value_rate),
        ),
        advantage=partial(per_group, center),
    )
