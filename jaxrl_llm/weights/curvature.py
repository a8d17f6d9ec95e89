"""Tokens whose gradient step would change the policy too much, by a second-order model of the last layer.

A token's gradient by the last layer `logits = W h` is `A v h^T` with `v = e_token - pi`. It is never formed for more
than one time step of the batch at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import Batch, Problem, Stage, masked


def hidden_state(logits: Array, tokens: Array, hidden: Array) -> Array:
    """`[... D]` float32: what the last layer is given where it predicts the token."""
    return hidden.astype(jnp.float32)


def top_logits(logits: Array, tokens: Array, hidden: Array, *, k: int = 50) -> Array:
    """`[... k]`: the highest logits, all of them if there are fewer than `k`."""
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))[0]


def top_ids(logits: Array, tokens: Array, hidden: Array, *, k: int = 50) -> Array:
    """`[... k]` int32: whose they are."""
    return jax.lax.top_k(logits, min(k, logits.shape[-1]))[1]


def within_curvature(
    *,
    objective_bound: float = 1e-2,
    policy_bound: float = 1e-4,
    rate: float = 1.5e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    symmetric: bool = True,
) -> Stage:
    """Selects the tokens with `-bound < dJ < bound` and `dF < policy_bound` (CAPO, 2510.00819).

    `dJ` is what a step along Adam's direction for this token alone would change in `A pi(token)`, to second order, and
    `dF` half the square of what it changes in `log pi(token)`. Needs the measures `hidden_state`, `top_logits` and
    `top_ids`. Memory mirrors Adam's moments for every row of `W`, `[V D]` twice, fed by the accepted tokens; until it
    holds something the direction is the gradient.

    Args:
      objective_bound: of `dJ`.
      policy_bound: of `dF`.
      rate: the optimiser's learning rate, which no slot sees: give both the same.
      b1: the optimiser's.
      b2: the optimiser's.
      eps: the optimiser's.
      symmetric: else `0 <= dJ < bound`.
    """
    return Stage(
        init=_empty,
        apply=functools.partial(
            _accepted,
            objective_bound=objective_bound,
            policy_bound=policy_bound,
            symmetric=symmetric,
            change=functools.partial(predicted, rate=rate, b1=b1, b2=b2, eps=eps),
        ),
        observe=functools.partial(_remember, b1=b1, b2=b2),
    )


class Token(NamedTuple):
    """What is seen of a token."""

    hidden: Array  # [D]
    pi: Array  # [k]
    ids: Array  # [k]
    residual: Array  # [k]: v
    advantage: Array  # []


def predicted(
    memory: dict[str, Array],
    token: Token,
    *,
    rate: float | Array,
    b1: float | Array,
    b2: float | Array,
    eps: float | Array,
) -> tuple[Array, Array]:
    """`dJ` and `dF` of one token."""
    gradient = token.advantage * token.residual[:, None] * token.hidden
    count = memory["count"] + 1
    first = (b1 * memory["first"][token.ids] + (1 - b1) * gradient) / (1 - b1**count)
    second = (b2 * memory["second"][token.ids] + (1 - b2) * jnp.square(gradient)) / (1 - b2**count)
    step = jnp.where(memory["count"] > 0, first / (jnp.sqrt(second) + eps), gradient)
    move = step @ token.hidden  # of the logits
    slope, mean = token.residual @ move, token.pi @ move
    curvature = token.advantage * (jnp.square(slope) - token.pi @ jnp.square(move - mean))
    change = rate * token.advantage * slope + rate**2 / 2 * curvature
    return change, rate**2 / 2 * jnp.square(slope)


def _empty(problem: Problem) -> dict[str, Array]:
    moments = {name: jnp.zeros((problem.vocab, problem.width)) for name in ("first", "second")}
    return {**moments, "count": jnp.zeros((), jnp.int32)}


def _tokens(batch: Batch) -> Token:
    """Time first, `[T B G ...]`, so that a loop over it leaves rows where they are; 0 where nothing counts."""
    extras = {} if batch.old is None else batch.old.extras
    if missing := sorted({"hidden_state", "top_logits", "top_ids"} - set(extras)):
        raise ValueError(f"within_curvature needs the measure {missing[0]!r} (Algorithm.measures)")
    if batch.advantage is None:
        raise ValueError("within_curvature needs batch.advantage")
    mask = batch.mask[..., None]
    # Another temperature than 1 is the same as a smaller or larger hidden state.
    tau = jnp.asarray(batch.rollouts.sampling.temperature)[..., None, None]
    tau = jnp.where(tau == 0, 1.0, tau)
    pi = jax.nn.softmax(masked(mask, extras["top_logits"] / tau))
    ids = jnp.where(mask, extras["top_ids"], 0)
    residual = (ids == batch.rollouts.tokens[..., None]) - pi
    advantage = masked(batch.mask, batch.advantage)
    tokens = Token(masked(mask, extras["hidden_state"] / tau), pi, ids, residual, advantage)
    return Token(*(jnp.moveaxis(x, 2, 0) for x in tokens))


def _accepted(
    memory: dict[str, Array],
    key: Array,
    batch: Batch,
    *,
    change: Callable[..., tuple[Array, Array]],
    objective_bound: float | Array,
    policy_bound: float | Array,
    symmetric: bool,
) -> tuple[Array, dict[str, Array]]:
    rows = jax.vmap(jax.vmap(functools.partial(change, memory)))
    objective, policy = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), jax.lax.map(rows, _tokens(batch)))
    above = objective > -objective_bound if symmetric else objective >= 0
    return above & (objective < objective_bound) & (policy < policy_bound), memory


def _remember(memory: dict[str, Array], batch: Batch, *, b1: float | Array, b2: float | Array) -> dict[str, Array]:
    """Adam's moments of each row of `W` an accepted token's ids touch, by the mean gradient of these tokens."""

    def add(sums: tuple[Array, Array], x: tuple[Token, Array]) -> tuple[tuple[Array, Array], None]:
        token, counts = x
        gradient = (counts * token.advantage)[..., None, None] * token.residual[..., None] * token.hidden[..., None, :]
        positions = jnp.broadcast_to(counts[..., None], token.ids.shape).astype(jnp.int32)
        return (sums[0].at[token.ids].add(gradient), sums[1].at[token.ids].add(positions)), None

    none = jnp.zeros_like(memory["first"]), jnp.zeros(memory["first"].shape[0], jnp.int32)
    (total, positions), _ = jax.lax.scan(add, none, (_tokens(batch), jnp.moveaxis(batch.mask, 2, 0)))
    touched, mean = (positions > 0)[:, None], total / jnp.maximum(positions, 1)[:, None]
    return {
        "first": jnp.where(touched, b1 * memory["first"] + (1 - b1) * mean, memory["first"]),
        "second": jnp.where(touched, b2 * memory["second"] + (1 - b2) * jnp.square(mean), memory["second"]),
        "count": memory["count"] + batch.mask.any(),
    }


def of_all_rows(batch: Batch) -> Array:
    """`[B G]`: rows with selected tokens per row that has tokens, so that a mean over the former is over the latter."""
    counts = batch.rollouts.mask if batch.keep is None else batch.rollouts.mask & batch.keep[..., None]
    share = batch.rows.sum() / jnp.maximum(counts.any(-1).sum(), 1)
    return jnp.broadcast_to(share, batch.rows.shape)
