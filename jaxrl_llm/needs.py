"""What a recipe reads, found by tracing it: nothing else is computed, and no other model is kept."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm import world as outside
from jaxrl_llm.algorithm import ROLES, SLOTS, Algorithm, roles_of
from jaxrl_llm.liveness import reads
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.policy import EXTRAS, Policy
from jaxrl_llm.stages import lift, write
from jaxrl_llm.types import Batch, Memory, Metrics, PyTree, Scores, Stage, TrainState, split

BATCH_SLOTS = ("reward", "filter", "advantage", "weight")


@dataclasses.dataclass(frozen=True)
class Needs:
    """The scores a recipe reads of each model, and the roles whose logits its measures ask for."""

    current: frozenset[str] = frozenset()
    prepare: frozenset[str] = frozenset()  # of the current policy, before the loss
    old: frozenset[str] = frozenset()
    reference: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()
    value: bool = False

    @property
    def critic(self) -> bool:
        return self.value or "value" in self.current | self.prepare

    @property
    def keeps_reference(self) -> bool:
        return bool(self.reference) or bool(self.others & {"reference", "teacher"})

    @property
    def keeps_lagged(self) -> bool:
        return "lagged" in self.others


class Loss(NamedTuple):
    """A loss with its memory and key bound."""

    value: Callable[[Scores, Batch], tuple[Array, Metrics]]
    aggregate: Callable[[Array], Array] = token_mean
    prepare: Callable[[Scores, Batch], PyTree] | None = None

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        return self.value(scores, batch)

    def prepared(self, scores: Scores, batch: Batch) -> Batch:
        assert self.prepare is not None
        return dataclasses.replace(batch, prepared=jax.lax.stop_gradient(self.prepare(scores, batch)))


def of_recipe(algorithm: Algorithm, memory: Memory, key: Array) -> Loss:
    """The recipe's loss: `PolicyLoss`, `LossStage`, or any function."""
    slot, stage = algorithm.loss, lift("loss", algorithm.loss)
    prepare = getattr(slot, "prepare", None)
    if prepare is not None and isinstance(slot, Stage):
        prepare = functools.partial(prepare, memory)

    def value(scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        found: tuple[Array, Metrics] = stage.apply(memory, key, scores, batch)[0]
        return found

    return Loss(value, getattr(slot, "aggregate", None) or token_mean, prepare)


def needs_of(
    algorithm: Algorithm,
    policy: Policy,
    init: Callable[[Array], TrainState],
    collect: Callable[..., Any],
    prompts: PyTree,
) -> Needs:
    """Traces the recipe on abstract data and sees which scores its loss, its slots and their memories depend on."""
    state, rollouts = jax.eval_shape(lambda key, prompts: collect(init(key), prompts), jax.random.key(0), prompts)
    params = jax.eval_shape(policy.whole, state.params)
    # Some read another context; the shapes are the same.
    every = {role: (params, jax.eval_shape(policy.hidden, params, rollouts)) for role in ROLES}
    names = frozenset(EXTRAS) | frozenset(algorithm.measures)
    of = functools.partial(policy.score, fields=names | {"logp", "entropy"}, measures=algorithm.measures)
    some = jax.eval_shape(lambda params, rollouts, every: of(params, rollouts, others=every), params, rollouts, every)
    alone = {k: x for k, x in some.extras.items() if k not in algorithm.measures or not roles_of(algorithm.measures[k])}
    plain = dataclasses.replace(some, extras=alone)
    token: Any = some.logp
    roles = {"old": plain, "reference": plain, "value": token}
    current = dataclasses.replace(some, value=token)

    def recipe(state: TrainState, rollouts: Any, current: Scores, before: Scores, roles: dict[str, Any]) -> Any:
        keys, stages = keys_of(state), stages_of(algorithm)
        batch, _ = outside.batch_of(rollouts, jnp.zeros(rollouts.tokens.shape[:2]), state.step)
        batch = dataclasses.replace(batch, **roles)
        outputs = []
        for slot in BATCH_SLOTS:
            outputs.append(stages[slot].apply(state.memory[slot], keys[slot], batch))
            batch = write(slot, batch, outputs[-1][0])
        loss = of_recipe(algorithm, state.memory["loss"], keys["loss"])
        whole = dataclasses.replace(batch, share=loss.aggregate(batch.mask))
        whole = loss.prepared(before, whole) if loss.prepare else whole
        value, _ = loss(current, whole)
        # Metrics alone do not make a recipe pay for a model.
        return value, outputs, [stage.observe(state.memory[slot], batch) for slot, stage in stages.items()]

    read = reads(recipe, state, rollouts, current, current, roles)
    now, before = _fields(read[2]), _fields(read[3])
    asked = {role for name in (now | before) & set(algorithm.measures) for role in roles_of(algorithm.measures[name])}
    return Needs(
        current=now | before,
        prepare=before,
        old=_fields(read[4]["old"]),
        reference=_fields(read[4]["reference"]),
        others=frozenset(asked),
        value=read[4]["value"],
    )


def _fields(read: Scores) -> frozenset[str]:
    named = {"logp": read.logp, "entropy": read.entropy, "value": read.value, **read.extras}
    return frozenset(name for name, was_read in named.items() if was_read)


def keys_of(state: TrainState) -> dict[str, Array]:
    """The keys of a step, by who consumes them."""
    return split(jax.random.fold_in(state.key, state.step), "draw", "logged", *SLOTS)


def stages_of(algorithm: Algorithm) -> dict[str, Stage]:
    """The recipe's slots as stages."""
    return {slot: lift(slot, getattr(algorithm, slot)) for slot in SLOTS}
