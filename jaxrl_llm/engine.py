"""The one compiled step: prompts, rollouts, rewards, credit, loss and optimiser as one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrl_llm import accumulate as micro
from jaxrl_llm import metrics as measure
from jaxrl_llm import world as outside
from jaxrl_llm.algorithm import Algorithm, numbers, with_numbers
from jaxrl_llm.liveness import reads
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.models.heads import Critic
from jaxrl_llm.policy import EXTRAS, Policy
from jaxrl_llm.stages import lift, write
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import (
    Batch,
    Learner,
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
    split,
)
from jaxrl_llm.updates.optimizer import adamw

BATCH_SLOTS = ("reward", "filter", "advantage", "weight")
SLOTS = ("prompt", "rollout", *BATCH_SLOTS, "loss", "update")
Models = tuple[dict[str, PyTree], dict[str, PyTree]]  # parameters and optimiser states by role


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a recipe reads, found by tracing it; nothing else is computed, and no other model is kept."""

    current: frozenset[str] = frozenset()
    old: frozenset[str] = frozenset()
    reference: frozenset[str] = frozenset()
    value: bool = False

    @property
    def critic(self) -> bool:
        return self.value or "value" in self.current


def learner(
    algorithm: Algorithm,
    *,
    policy: Policy,
    task: Task,
    params: PyTree | None = None,
    reference: PyTree | None = None,
    critic: Critic | None = None,
    optimizer: optax.GradientTransformation | None = None,
    critic_optimizer: optax.GradientTransformation | None = None,
    prompts_per_step: int = 8,
    response_length: int | None = None,
    sampling: Sampling | None = None,
    accumulate: int = 1,
    verify: str = "inside",
    constrain: Callable[[Prompts], Prompts] = lambda prompts: prompts,
) -> Learner:
    """The two functions of a run.

    Args:
      algorithm: the recipe.
      policy: the language model as functions.
      task: prompts and verifier.
      params: where the policy starts; `policy.init(key)` if None.
      reference: the reference policy; a copy of the starting policy if None. Kept only if the recipe reads it.
      critic: needed by recipes that read values.
      optimizer: for the policy; `adamw(1e-6)` if None.
      critic_optimizer: for the critic; `adamw(1e-5)` if None.
      prompts_per_step: `B`.
      response_length: `T`, tokens; the task's if None.
      sampling: the behaviour distribution.
      accumulate: micro-batches per optimiser step; changes memory, not the result.
      verify: where a verifier that runs on the host is asked. "inside": by a callback, the step being one program.
        "between": the step is two programs (collect, learn) with the verifier between them.
      constrain: applied to the prompts of each step, to shard them (see `sharding.over_data`).

    Returns:
      `Learner(init, step)`. `step(state, prompts=None)` draws prompts from the task if given none.

    Raises:
      ValueError: the recipe reads values and there is no critic; sizes that do not divide (when traced); a task that
        cannot be drawn from inside the step.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if verify not in ("inside", "between"):
        raise ValueError(f"verify must be 'inside' or 'between', got {verify!r}")
    length = task.response_length if response_length is None else response_length
    behaviour = jax.tree.map(_strong, sampling or Sampling())
    optimizers = {"policy": optimizer or adamw(1e-6), "critic": critic_optimizer or adamw(1e-5)}
    ask = outside.verifier(task)

    def init(key: Array, needs: Needs) -> TrainState:
        keys = split(key, "policy", "critic", "run")
        models = {"policy": policy.init(keys["policy"]) if params is None else _copy(params)}
        if needs.reference:
            models["reference"] = _copy(models["policy"] if reference is None else reference)
        if needs.critic and critic is not None:
            models["critic"] = critic.init(keys["critic"])
        problem = Problem(rows=task.rows, prompts=prompts_per_step, length=length, vocab=policy.vocab, params=models)
        trained = {role: optimizers[role].init(models[role]) for role in models if role != "reference"}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=keys["run"],
            params=models,
            opt_state=jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), trained),
            memory={slot: stage.init(problem) for slot, stage in _stages(algorithm).items()},
            # Copies: a state is donated to its first step.
            numbers=_copy(numbers(algorithm)),
            sampling=_copy(behaviour),
        )

    # --- the step ----------------------------------------------------------------------------------------------------

    def collect(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Rollouts]:
        """Prompts and rollouts."""
        keys, memory = _keys(state), dict(state.memory)
        stages = _stages(with_numbers(algorithm, state.numbers))
        prompts = outside.draw(task, keys["draw"], prompts_per_step) if prompts is None else prompts
        if prompts.logged is None and task.demonstrate is not None:
            prompts = dataclasses.replace(prompts, logged=task.demonstrate(keys["logged"], prompts))
        prompts, memory["prompt"] = stages["prompt"].apply(memory["prompt"], keys["prompt"], constrain(prompts))
        world = World(
            sample=functools.partial(outside.sample, policy, task, length, state),
            score=lambda role, rollouts: score(state.params[role], rollouts, frozenset({"logp", "entropy"})),
            reward=functools.partial(ask, inside=verify == "inside"),
            models=state.params,
            step=state.step,
        )
        rollouts, memory["rollout"] = stages["rollout"].apply(memory["rollout"], keys["rollout"], world, prompts)
        prompts = dataclasses.replace(rollouts.prompts, logged=None)  # rollouts alone read what was logged
        return dataclasses.replace(state, memory=memory), dataclasses.replace(rollouts, prompts=prompts)

    def learn(state: TrainState, rollouts: Rollouts, outcome: Array, needs: Needs) -> tuple[TrainState, Metrics]:
        """Rewards, credit, and the optimiser steps the recipe's update asks for."""
        keys, memory = _keys(state), dict(state.memory)
        stages = _stages(with_numbers(algorithm, state.numbers))
        batch, scored = outside.batch_of(rollouts, outcome, state.step)
        batch = with_roles(batch, state.params, needs)
        for slot in BATCH_SLOTS:
            output, memory[slot] = stages[slot].apply(memory[slot], keys[slot], batch)
            batch = write(slot, batch, output)
        loss = functools.partial(stages["loss"].apply, memory["loss"], keys["loss"])
        (models, measured), memory["update"] = stages["update"].apply(
            memory["update"],
            keys["update"],
            (state.params, state.opt_state),
            batch,
            functools.partial(optimise, loss, needs),
        )
        memory = {slot: stage.observe(memory[slot], batch) for slot, stage in stages.items()}
        new = dataclasses.replace(state, step=state.step + 1, params=models[0], opt_state=models[1], memory=memory)
        return new, {**measure.of_batch(batch, scored), **measured}

    def optimise(loss: Callable[..., Any], needs: Needs, models: Models, batch: Batch) -> tuple[Models, Metrics]:
        """One optimiser step. Shares are of the whole batch, so its parts only add up."""
        params, opt_state = models
        batch = _with_shares(algorithm, batch)

        def objective(trained: dict[str, PyTree], part: Batch) -> tuple[Array, Metrics]:
            scores = score_current({**params, **trained}, part.rollouts, needs.current)
            (value, found), _ = loss(scores, part)
            return value, jax.lax.stop_gradient({**measure.of_scores(scores, part), **found})

        trained = {role: params[role] for role in opt_state}
        (value, found), gradients = micro.value_and_grad(objective, trained, batch, accumulate)
        params, opt_state, norms = dict(params), dict(opt_state), {}
        for role, gradient in gradients.items():
            change, opt_state[role] = optimizers[role].update(gradient, opt_state[role], params[role])
            params[role] = optax.apply_updates(params[role], change)
            norms["grad_norm" if role == "policy" else f"grad_norm/{role}"] = optax.tree.norm(gradient)
        return (params, opt_state), {"loss": value, **norms, **measure.summarise(found, batch)}

    # --- likelihoods and values --------------------------------------------------------------------------------------

    def score(params: PyTree, rollouts: Rollouts, fields: frozenset[str]) -> Scores:
        """In as many parts as the gradient, so that it needs no more memory."""
        return micro.mapped(functools.partial(policy.score, params, fields=fields), rollouts, accumulate)

    def score_current(params: dict[str, PyTree], rollouts: Rollouts, fields: frozenset[str]) -> Scores:
        if "value" not in fields or critic is None:
            return policy.score(params["policy"], rollouts, fields=fields)
        value = functools.partial(critic.value, params["critic"])
        if critic.shared:
            return policy.score(params["policy"], rollouts, fields=fields, heads={"value": value})
        scores = policy.score(params["policy"], rollouts, fields=fields - {"value"})
        return dataclasses.replace(scores, value=value(rollouts))

    def with_roles(batch: Batch, params: dict[str, PyTree], needs: Needs) -> Batch:
        """What other models, and the policy before its update, say of the rollouts: only what the recipe reads."""
        rollouts = batch.rollouts
        if needs.old:
            batch = dataclasses.replace(batch, old=score(params["policy"], rollouts, needs.old))
        if needs.reference:
            batch = dataclasses.replace(batch, reference=score(params["reference"], rollouts, needs.reference))
        if needs.value:
            only = functools.partial(score_current, params, fields=frozenset({"value"}))
            batch = dataclasses.replace(batch, value=micro.mapped(only, rollouts, accumulate).value)
        return jax.lax.stop_gradient(batch)

    # --- what is given out -------------------------------------------------------------------------------------------

    needs = _needs(algorithm, functools.partial(init, needs=Needs()), collect, outside.example(task, prompts_per_step))
    if needs.critic and critic is None:
        raise ValueError(
            "this recipe reads values (batch.value or scores.value) and has no critic: pass critic=heads.critic(model) "
            "or critic=heads.value_head(width)"
        )

    def step(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        state, rollouts = collect(state, prompts)
        return learn(state, rollouts, ask(rollouts, inside=True), needs)

    first, second = jax.jit(collect), jax.jit(functools.partial(learn, needs=needs))

    def step_in_two(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        state, rollouts = first(state, prompts)
        return second(state, rollouts, ask(rollouts, inside=False))  # type: ignore[no-any-return]

    inside = verify == "inside"
    return Learner(functools.partial(init, needs=needs), step if inside else step_in_two, compiled=inside)


def _needs(
    algorithm: Algorithm, init: Callable[[Array], TrainState], collect: Callable[..., Any], prompts: PyTree
) -> Needs:
    """Traces the recipe on abstract data and sees which scores its loss, its slots and their memories depend on."""
    state, rollouts = jax.eval_shape(lambda key, prompts: collect(init(key), prompts), jax.random.key(0), prompts)

    def recipe(state: TrainState, rollouts: Rollouts, current: Scores, roles: dict[str, Any]) -> Any:
        keys, stages = _keys(state), _stages(algorithm)
        batch, _ = outside.batch_of(rollouts, jnp.zeros(rollouts.tokens.shape[:2]), state.step)
        batch = dataclasses.replace(batch, **roles)
        outputs = []
        for slot in BATCH_SLOTS:
            outputs.append(stages[slot].apply(state.memory[slot], keys[slot], batch))
            batch = write(slot, batch, outputs[-1][0])
        (value, _), _ = stages["loss"].apply(
            state.memory["loss"], keys["loss"], current, _with_shares(algorithm, batch)
        )
        # Metrics alone do not make a recipe pay for a model.
        return value, outputs, [stage.observe(state.memory[slot], batch) for slot, stage in stages.items()]

    token: Any = jax.ShapeDtypeStruct(rollouts.tokens.shape, jnp.float32)
    some = Scores(logp=token, entropy=token, extras=dict.fromkeys(EXTRAS, token))
    roles = {"old": some, "reference": some, "value": token}
    read = reads(recipe, state, rollouts, dataclasses.replace(some, value=token), roles)
    return Needs(_fields(read[2]), _fields(read[3]["old"]), _fields(read[3]["reference"]), read[3]["value"])


def _fields(read: Scores) -> frozenset[str]:
    named = {"logp": read.logp, "entropy": read.entropy, "value": read.value, **read.extras}
    return frozenset(name for name, was_read in named.items() if was_read)


def _with_shares(algorithm: Algorithm, batch: Batch) -> Batch:
    return dataclasses.replace(batch, share=getattr(algorithm.loss, "aggregate", token_mean)(batch.mask))


def _keys(state: TrainState) -> dict[str, Array]:
    return split(jax.random.fold_in(state.key, state.step), "draw", "logged", *SLOTS)


def _stages(algorithm: Algorithm) -> dict[str, Stage]:
    return {slot: lift(slot, getattr(algorithm, slot)) for slot in SLOTS}


def _strong(x: Any) -> Array:
    """An array of 32 bits and no weak type: replacing it by another one compiles nothing."""
    return jnp.asarray(x, jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.int32)


def _copy(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.array, tree)
