"""Groups that grow in rounds, each prompt by as much as its mean reward is uncertain (XRPO, 2510.06672)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.scipy.special import betainc

from jaxrl_llm.contexts import widen
from jaxrl_llm.stats import masked_var
from jaxrl_llm.types import Context, Prompts, Rollouts, World, split


def two_sided(alpha: float | Array, freedom: Array) -> Array:
    """The `t` with `P(|T| > t) = alpha` under Student's distribution, by bisection below 10000; `freedom > 0`."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low + high) / 2
        above = betainc(freedom / 2, 0.5, freedom / (freedom + middle**2)) > alpha
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    found: Array = jax.lax.fori_loop(0, 60, halve, (jnp.zeros_like(freedom), jnp.full_like(freedom, 1e4)))[0]
    return found


def gains(alpha: float | Array, *, largest: int) -> Array:
    """`[largest + 1]`: what one rollout more takes off the half-width of a mean over `n` rewards of deviation 1.

    The interval is `t_(1 - alpha/2, n - 1) / sqrt(n)` to either side; there is none, and nothing to gain, below 2.
    """
    n = jnp.arange(2.0, largest + 2)
    half = two_sided(alpha, n - 1) / jnp.sqrt(n)
    return jnp.concatenate([jnp.zeros(2), half[:-1] - half[1:]])


def greedy(std: Array, asked: Array, gain: Array, *, budget: int, most: int, bonus: float | Array) -> Array:
    """`[B]` int32: `budget` rollouts, one after another to the prompt with the highest priority.

    That is `std * gain[n] + bonus * sqrt(log(1 + N) / n)`, of `n` rollouts of this prompt and `N` of all.

    Args:
      std: `[B]`, of the rewards; held fixed.
      asked: `[B]` int32, rollouts so far.
      gain: of `gains`.
      budget: at most `B * most`.
      most: for one prompt.
      bonus: for being asked little.
    """

    def give(sizes: Array, _: None) -> tuple[Array, None]:
        n = asked + sizes
        priority = std * gain[n] + bonus * jnp.sqrt(jnp.log1p(n.sum()) / n)
        return sizes.at[jnp.where(sizes < most, priority, -jnp.inf).argmax()].add(1), None

    found: Array = jax.lax.scan(give, jnp.zeros_like(asked), None, length=budget)[0]
    return found


def sample_in_rounds(
    world: World,
    key: Array,
    prompts: Prompts,
    *,
    base: int,
    rounds: int,
    mean: int,
    most: int,
    alpha: float | Array,
    bonus: float | Array,
    context: Callable[[Rollouts], Context],
) -> Rollouts:
    """`base` responses to each prompt, then `rounds` times `mean` a prompt on average, by `greedy`.

    Args:
      world: samples and verifies.
      key: consumed.
      prompts: `[B]`.
      base: at least 2.
      rounds: how often the rewards are looked at again.
      mean: of a round.
      most: for one prompt in one round.
      alpha: of `gains`.
      bonus: of `greedy`.
      context: `(the first rollouts, verified) -> [B 1 S]`: what later responses are sampled and scored after.

    Returns:
      groups of `base + rounds * most` rows, of which those that were not asked have no token; with `outcome`.
    """
    keys = split(key, "base", "rounds")
    first = world.sample(keys["base"], prompts, base)
    first = dataclasses.replace(first, outcome=(outcome := world.reward(first)))
    if rounds == 0:
        return first
    later, gain = context(first), gains(alpha, largest=base + rounds * most)
    known = tuple(jnp.pad(x, ((0, 0), (0, rounds * most))) for x in (outcome, jnp.ones_like(first.truncated)))

    def ask(known: tuple[Array, ...], x: tuple[Array, Array]) -> tuple[tuple[Array, ...], dict[str, Any]]:
        outcome, asked = known
        std = jnp.sqrt(masked_var(outcome, asked & ~jnp.isnan(outcome), axis=-1))
        total = std.shape[0] * mean
        sizes = greedy(std, asked.sum(-1), gain, budget=total, most=most, bonus=bonus)
        there = jnp.arange(most) < sizes[:, None]
        rollouts = world.sample(x[1], prompts, most, context=later, limit=jnp.where(there, world.length, 0))
        new = dataclasses.replace(rollouts, outcome=(found := world.reward(rollouts)))
        place = (0, base + x[0] * most)
        known = tuple(jax.lax.dynamic_update_slice(a, b, place) for a, b in zip(known, (found, there), strict=True))
        return known, _rows(new)

    _, found = jax.lax.scan(ask, known, (jnp.arange(rounds), jax.random.split(keys["rounds"], rounds)))
    rows = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), found)
    together = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), _rows(first), rows)
    return dataclasses.replace(first, context=_contexts(first.context, later, base, rounds * most), **together)


def _rows(rollouts: Rollouts) -> dict[str, Any]:
    names = ("tokens", "mask", "role", "logp", "entropy", "version", "truncated", "sampling", "outcome")
    return {name: getattr(rollouts, name) for name in names}


def _contexts(first: Context, later: Context, base: int, rest: int) -> Context:
    """Those of the rows, each for as many consecutive ones as share it and divide both parts."""
    each = math.gcd(base, rest)
    first = widen(first, later.tokens.shape[-1])
    both: Context = jax.tree.map(
        lambda a, b: jnp.concatenate([jnp.repeat(a, base // each, 1), jnp.repeat(b, rest // each, 1)], axis=1),
        first,
        later,
    )
    return both
