"""Responses that came with the data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import INJECTED, PADDING, Logged, Prompts, Rollouts, Sampling, World


def logged(world: World, key: Array, prompts: Prompts, *, take: int | None = None) -> Rollouts:
    """`prompts.logged` as rollouts: nothing is sampled, the outcome is the logged reward, behaviour log-probs are 0.

    Scored under the unfiltered distribution at temperature 1.

    Args:
      world: asked for the step only.
      key: not used.
      prompts: with logged responses.
      take: how many rows of each group, those with the highest reward, earlier ones first among equals; all if None.

    Raises:
      ValueError: the prompts carry no responses, or fewer than `take`.
    """
    if prompts.logged is None:
        raise ValueError("logged needs prompts.logged: this data has no responses; use sample_group to draw some")
    data = prompts.logged if take is None else _best(prompts.logged, take)
    rows, shape = data.mask.shape[:2], data.mask.shape
    return Rollouts(
        prompts=prompts,
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=data.tokens,
        mask=data.mask,
        role=jnp.where(data.mask, INJECTED, PADDING).astype(jnp.int8),
        logp=jnp.zeros(shape),
        entropy=jnp.zeros(shape),
        version=jnp.broadcast_to(jnp.asarray(world.step, jnp.int32), shape),
        truncated=jnp.zeros(rows, bool),
        sampling=Sampling(temperature=jnp.ones(rows)),
        outcome=data.reward,
    )


def _best(data: Logged, take: int) -> Logged:
    rows = data.mask.shape[1]
    if not 1 <= take <= rows:
        raise ValueError(f"logged: take must be 1 to {rows}, the responses a prompt has, got {take}")
    _, order = jax.lax.top_k(jnp.where(data.mask.any(-1), data.reward, -jnp.inf), take)
    return Logged(
        tokens=jnp.take_along_axis(data.tokens, order[..., None], 1),
        mask=jnp.take_along_axis(data.mask, order[..., None], 1),
        reward=jnp.take_along_axis(data.reward, order, 1),
    )
