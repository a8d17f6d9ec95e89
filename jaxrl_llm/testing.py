"""Small batches from plain numbers, and a loss's value and gradient on them: for tests and notebooks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from jaxrl_llm import world as outside
from jaxrl_llm.algorithm import ROLES, Algorithm, roles_of
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.needs import of_recipe
from jaxrl_llm.policy import Policy
from jaxrl_llm.rewards.basic import at_last_token
from jaxrl_llm.stages import lift, write
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import (
    PADDING,
    POLICY,
    Batch,
    Context,
    Metrics,
    Problem,
    Prompts,
    PyTree,
    Rollouts,
    Sampling,
    Scores,
    Stage,
    TrainState,
    World,
)


class Evaluated(NamedTuple):
    """A loss at some scores."""

    value: Array  # []
    coefficient: Array  # [B G T]: N * d value / d logp, N the tokens that count
    metrics: Metrics


def toy_prompts(rows: int, *, length: int = 2) -> Prompts:
    """`rows` prompts of `length` tokens, all different, with `target` their index."""
    # Made by numpy, here and below: outside of a program each operation of JAX on a new shape is compiled.
    index = np.arange(rows, dtype=np.int32)
    tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
    context = Context(tokens=jnp.asarray(tokens), mask=jnp.asarray(np.ones(tokens.shape, bool)))
    return Prompts(context=context, index=jnp.asarray(index), target=jnp.asarray(index))


def toy_batch(
    *,
    logp: ArrayLike,
    mask: ArrayLike | None = None,
    outcome: ArrayLike | None = None,
    reward: ArrayLike | None = None,
    advantage: ArrayLike | None = None,
    old: ArrayLike | None = None,
    reference: ArrayLike | None = None,
    value: ArrayLike | None = None,
    weight: ArrayLike | None = None,
    keep: ArrayLike | None = None,
    tokens: ArrayLike | None = None,
    role: ArrayLike | None = None,
    truncated: ArrayLike | None = None,
) -> Batch:
    """A batch as the slots see it.

    Args:
      logp: `[B G T]` of the sampler.
      mask: `[B G T]`, everything if None.
      outcome: `[B G]`, 0 if None.
      reward: `[B G]` or `[B G T]`; the outcome if None.
      advantage: `[B G]` or `[B G T]`.
      old: `[B G T]` log-probs.
      reference: `[B G T]` log-probs.
      value: `[B G T]` of the critic.
      weight: `[B G T]`.
      keep: `[B G]`.
      tokens: `[B G T]`, all different if None.
      role: `[B G T]`; POLICY where `mask` if None.
      truncated: `[B G]`, False if None.
    """
    logp = jnp.asarray(logp)
    shape = logp.shape
    mask = jnp.asarray(np.ones(shape) if mask is None else mask, bool)
    prompts = toy_prompts(shape[0])
    token_ids = jnp.asarray(np.arange(logp.size, dtype=np.int32).reshape(shape) if tokens is None else tokens)
    rollouts = Rollouts(
        prompts=prompts,
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=token_ids,
        mask=mask,
        role=jnp.where(mask, POLICY, PADDING).astype(jnp.int8) if role is None else jnp.asarray(role, jnp.int8),
        logp=logp,
        entropy=jnp.asarray(np.zeros(shape, logp.dtype)),
        version=jnp.asarray(np.zeros(shape, np.int32)),
        truncated=jnp.asarray(np.zeros(shape[:2]) if truncated is None else truncated, bool),
        sampling=Sampling(temperature=jnp.asarray(np.ones(shape[:2], np.float32))),
    )
    outcome = jnp.asarray(np.zeros(shape[:2]) if outcome is None else outcome, logp.dtype)
    rewards = outcome if reward is None else jnp.asarray(reward, logp.dtype)
    return Batch(
        rollouts=rollouts,
        step=jnp.asarray(np.zeros((), np.int32)),
        outcome=outcome,
        old=None if old is None else Scores(logp=jnp.asarray(old)),
        reference=None if reference is None else Scores(logp=jnp.asarray(reference)),
        value=None if value is None else jnp.asarray(value),
        reward=rewards.sum(-1) if rewards.ndim == 3 else rewards,
        token_reward=rewards if rewards.ndim == 3 else at_last_token(mask, rewards),
        keep=None if keep is None else jnp.asarray(keep, bool),
        advantage=None if advantage is None else _per_token(jnp.asarray(advantage), shape),
        weight=None if weight is None else jnp.asarray(weight),
    )


def toy_rows(*, fill: float = 0.0, **fields: Any) -> tuple[Scores, Batch]:
    """One group of two rows of 3 and 2 tokens with log-probs of four policies: small enough to check by hand.

    Args:
      fill: what stands in the one masked slot of every per-token array.
      fields: further arguments of `toy_batch`, or other values for those given here.
    """
    given: dict[str, Any] = {
        "logp": jnp.array([[[-0.5, -1.0, -2.0], [-0.7, -0.3, fill]]]),
        "reference": jnp.array([[[-0.6, -0.9, -1.8], [-0.8, -0.4, fill]]]),
        "advantage": jnp.array([[[1.0, 1.0, 1.0], [-1.0, -1.0, fill]]]),
        "outcome": jnp.array([[1.0, 0.0]]),
    }
    scores = Scores(logp=jnp.array([[[-0.3, -1.1, -1.5], [-1.0, -0.1, fill]]]))
    return scores, toy_batch(mask=jnp.array([[[1, 1, 1], [1, 1, 0]]]), **(given | fields))


def random_batch(
    key: Array,
    *,
    prompts: int = 3,
    size: int = 4,
    length: int = 5,
    fill: float = 0.0,
    measures: Mapping[str, Callable[..., Array]] | None = None,
) -> tuple[Scores, Batch]:
    """A batch of ragged rows, one of them empty and one not kept, with every field there and groups that are mixed.

    Args:
      key: decides everything, `fill` apart.
      prompts: B.
      size: G, at least 3.
      length: T.
      fill: what stands in masked slots of per-token arrays and in the outcome of rows that do not count.
      measures: of a recipe: in the extras of the current, old and reference policy, found from random logits.
    """
    exists, keep, outcome, arrays = _random(key, (prompts, size, length), fill)
    behaviour, near, old, reference, value, new_value, entropy = arrays
    batch = toy_batch(
        logp=behaviour, mask=exists, keep=keep, outcome=outcome, old=old, reference=reference, value=value
    )
    scores = Scores(logp=near, entropy=entropy, value=new_value)
    return (scores, batch) if not measures else _measured(jax.random.fold_in(key, 9), scores, batch, measures, fill)


@functools.partial(jax.jit, static_argnums=1)
def _random(key: Array, shape: tuple[int, int, int], fill: float) -> tuple[Array, Array, Array, list[Array]]:
    prompts, _, length = shape
    keys = jax.random.split(key, 9)
    lengths = jax.random.randint(keys[0], shape[:2], 1, length + 1).at[0, 2].set(0)
    exists = jnp.arange(length) < lengths[..., None]
    keep = (lengths > 0).at[1, 2].set(False)
    counts = exists & keep[..., None]
    draw = [jnp.where(counts, jax.random.normal(k, shape), fill) for k in keys[1:8]]
    logp, near, old, reference, *others = draw
    behaviour = jnp.where(counts, -jnp.abs(logp), fill)
    policies = [behaviour + scale * x for scale, x in ((0.3, near), (0.1, old), (0.3, reference))]
    outcome = jnp.zeros(shape[:2]).at[:, 0].set(1.0).at[:, -1].set(jax.random.bernoulli(keys[8], 0.5, (prompts,)))
    return exists, keep, jnp.where(keep, outcome, fill), [behaviour, *policies, *others]


def _measured(
    key: Array, scores: Scores, batch: Batch, measures: Mapping[str, Callable[..., Array]], fill: float
) -> tuple[Scores, Batch]:
    """With the measures of all policies, except those the old and the reference have not: of several roles' logits."""
    tokens, counts = batch.rollouts.tokens, batch.mask
    keys = jax.random.split(key, 1 + len(ROLES))
    logits = [jax.random.normal(k, (*tokens.shape, tokens.size)) for k in keys]
    roles = dict(zip(ROLES, logits[1:], strict=True))

    def of(own: Array, name: str) -> Array:
        x = measures[name](own, tokens, own[..., :8], **{role: roles[role] for role in roles_of(measures[name])})
        blank = jnp.asarray(fill if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype)
        return jnp.where(counts.reshape(*counts.shape, *[1] * (x.ndim - 3)), x, blank)

    assert batch.old is not None and batch.reference is not None
    alone = [name for name in measures if not roles_of(measures[name])]
    old, reference = ({name: of(roles[role], name) for name in alone} for role in ("old", "reference"))
    batch = dataclasses.replace(
        batch,
        old=dataclasses.replace(batch.old, extras=old),
        reference=dataclasses.replace(batch.reference, extras=reference),
    )
    return dataclasses.replace(scores, extras={name: of(logits[0], name) for name in measures}), batch


def problem_of(batch: Batch) -> Problem:
    """What stages may know of a run with such batches."""
    tokens = batch.rollouts.tokens.shape
    vocab = int(batch.rollouts.tokens.size)
    return Problem(rows=tokens[0], prompts=tokens[0], length=tokens[-1], vocab=vocab, params={}, width=8)


def with_fresh_loss(algorithm: Algorithm, batch: Batch) -> Algorithm:
    """The recipe with a loss that can be called: one that remembers gets its first memory."""
    if not isinstance(algorithm.loss, Stage):
        return algorithm
    loss: Any = of_recipe(algorithm, algorithm.loss.init(problem_of(batch)), jax.random.key(0))
    return dataclasses.replace(algorithm, loss=loss)


def prepare(algorithm: Algorithm, batch: Batch) -> Batch:
    """Runs the reward, filter, advantage and weight slots, as the engine does; stages start with fresh memory."""
    problem = problem_of(batch)
    keep = batch.rollouts.mask.any(-1) if batch.keep is None else batch.keep
    batch = dataclasses.replace(batch, reward=None, token_reward=None, advantage=None, keep=keep)
    batch = dataclasses.replace(batch, weight=None, select=None)
    for slot in ("reward", "filter", "advantage", "weight"):
        stage = lift(slot, getattr(algorithm, slot))
        output, _ = stage.apply(stage.init(problem), jax.random.key(0), batch)
        batch = write(slot, batch, output)
    return batch


def whole_step(loss: Callable[[Scores, Batch], Any], scores: Scores, batch: Batch) -> Batch:
    """`batch` with what the engine finds on the whole optimiser step: shares, and what the loss prepares."""
    batch = dataclasses.replace(batch, share=getattr(loss, "aggregate", token_mean)(batch.mask))
    if prepare := getattr(loss, "prepare", None):
        batch = dataclasses.replace(batch, prepared=jax.lax.stop_gradient(prepare(scores, batch)))
    return batch


def evaluate(loss: Callable[[Scores, Batch], Any], scores: Scores, batch: Batch) -> Evaluated:
    """The loss as the engine computes it in one optimiser step, and its derivative by every token's log-prob."""
    batch = whole_step(loss, scores, batch)

    def of(logp: Array) -> tuple[Array, Metrics]:
        value, metrics = loss(dataclasses.replace(scores, logp=logp), batch)
        return value, metrics

    assert scores.logp is not None
    (value, metrics), gradient = jax.value_and_grad(of, has_aux=True)(scores.logp)
    return Evaluated(value, gradient * batch.mask.sum(), metrics)


def _per_token(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.ndim == 3 else jnp.broadcast_to(x[..., None], shape)


def toy_world(
    policy: Policy,
    task: Task,
    params: PyTree,
    *,
    length: int,
    step: int = 0,
    sampling: Sampling | None = None,
    reward: Callable[[Rollouts], Array] | None = None,
) -> World:
    """A world with the given parameters, outside of any training.

    Args:
      policy: samples.
      task: its end token, its stop sequences and, if `reward` is None, its verifier.
      params: of the policy.
      length: `T`.
      step: the version of the tokens.
      sampling: the distribution; temperature 1 if None.
      reward: `(Rollouts) -> [B G]`.
    """
    sampling = Sampling(temperature=jnp.ones(())) if sampling is None else sampling
    state = TrainState(
        step=jnp.asarray(step, jnp.int32),
        key=jax.random.key(0),
        params={"policy": params},
        opt_state={},
        memory={},
        numbers={},
        sampling=sampling,
    )
    return World(
        sample=functools.partial(outside.sample, policy, task, length, state),
        score=lambda role, rollouts: policy.score(params, rollouts, frozenset({"logp", "entropy"})),
        reward=functools.partial(outside.verifier(task), inside=True) if reward is None else reward,
        models=state.params,
        step=state.step,
        length=length,
        sampling=sampling,
    )
