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
from jax.typing import ArrayLike, DTypeLike

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


def compiled(f: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    """`f` with some arguments bound as one program; what it finds comes as arrays of numpy."""
    program = jax.jit(functools.partial(f, **fixed))
    return lambda *arrays, **named: jax.tree.map(np.asarray, program(*arrays, **named))


def toy_prompts(rows: int, *, length: int = 2) -> Prompts:
    """`rows` prompts of `length` tokens, all different, with `target` their index."""
    prompts: Prompts = jax.tree.map(jnp.asarray, _toy_prompts(rows, length))
    return prompts


def _toy_prompts(rows: int, length: int) -> Prompts:
    # Made by numpy, here and below: outside of a program each operation of JAX on a new shape is compiled.
    index = _known(np.arange(rows, dtype=np.int32))
    tokens = _known(np.arange(rows * length, dtype=np.int32).reshape(rows, length))
    return Prompts(
        context=Context(tokens=tokens, mask=_known(np.ones((rows, length), bool))), index=index, target=index
    )


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
    logp = _known(logp)
    shape = logp.shape
    mask = _known(np.ones(shape) if mask is None else mask, bool)
    prompts = _toy_prompts(shape[0], 2)
    rollouts = Rollouts(
        prompts=prompts,
        context=jax.tree.map(lambda x: x[:, None], prompts.context),
        tokens=_known(np.arange(logp.size, dtype=np.int32).reshape(shape) if tokens is None else tokens),
        mask=mask,
        role=mask.astype(np.int8) * (POLICY - PADDING) + PADDING if role is None else _known(role, np.int8),
        logp=logp,
        entropy=_known(np.zeros(shape), logp.dtype),
        version=_known(np.zeros(shape), np.int32),
        truncated=_known(np.zeros(shape[:2]) if truncated is None else truncated, bool),
        sampling=Sampling(temperature=_known(np.ones(shape[:2]))),
    )
    outcome = _known(np.zeros(shape[:2]) if outcome is None else outcome, logp.dtype)
    rewards = outcome if reward is None else _known(reward, logp.dtype)
    batch = Batch(
        rollouts=rollouts,
        step=_known(0, np.int32),
        outcome=outcome,
        old=None if old is None else Scores(logp=_known(old)),
        reference=None if reference is None else Scores(logp=_known(reference)),
        value=None if value is None else _known(value),
        reward=rewards.sum(-1) if rewards.ndim == 3 else rewards,
        token_reward=rewards if rewards.ndim == 3 else _at_last_token(mask, rewards),
        keep=None if keep is None else _known(keep, bool),
        advantage=None if advantage is None else _per_token(_known(advantage), shape),
        weight=None if weight is None else _known(weight),
    )
    arrays: Batch = jax.tree.map(jnp.asarray, batch)
    return arrays


_at_last_token = jax.jit(at_last_token)


def _known(x: ArrayLike, dtype: DTypeLike | None = None) -> Array:
    """As an array of numpy, whose operations compile nothing; what a program is still to find as it is."""
    array: Any = x if isinstance(x, jax.core.Tracer) else np.asarray(x)
    known: Array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype))
    return known


def toy_rows(*, fill: float = 0.0, **fields: Any) -> tuple[Scores, Batch]:
    """One group of two rows of 3 and 2 tokens with log-probs of four policies: small enough to check by hand.

    Args:
      fill: what stands in the one masked slot of every per-token array.
      fields: further arguments of `toy_batch`, or other values for those given here.
    """
    given: dict[str, Any] = {
        "logp": np.array([[[-0.5, -1.0, -2.0], [-0.7, -0.3, fill]]]),
        "reference": np.array([[[-0.6, -0.9, -1.8], [-0.8, -0.4, fill]]]),
        "advantage": np.array([[[1.0, 1.0, 1.0], [-1.0, -1.0, fill]]]),
        "outcome": np.array([[1.0, 0.0]]),
    }
    scores = Scores(logp=jnp.asarray(np.array([[[-0.3, -1.1, -1.5], [-1.0, -0.1, fill]]])))
    return scores, toy_batch(mask=np.array([[[1, 1, 1], [1, 1, 0]]]), **(given | fields))


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
    """`fill_slots` as one program."""
    prepared: Batch = jax.jit(functools.partial(fill_slots, algorithm))(batch)
    return prepared


def fill_slots(algorithm: Algorithm, batch: Batch) -> Batch:
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
    evaluated: Evaluated = jax.jit(functools.partial(_evaluate, loss))(scores, batch)
    return evaluated


def _evaluate(loss: Callable[[Scores, Batch], Any], scores: Scores, batch: Batch) -> Evaluated:
    batch = whole_step(loss, scores, batch)

    def of(logp: Array) -> tuple[Array, Metrics]:
        value, metrics = loss(dataclasses.replace(scores, logp=logp), batch)
        return value, metrics

    assert scores.logp is not None
    (value, metrics), gradient = jax.value_and_grad(of, has_aux=True)(scores.logp)
    return Evaluated(value, gradient * batch.mask.sum(), metrics)


def _per_token(x: Array, shape: tuple[int, ...]) -> Array:
    return x if x.ndim == 3 else x[..., None] * np.ones(shape, x.dtype)


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
