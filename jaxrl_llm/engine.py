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
from jax.sharding import Mesh

from jaxrl_llm import accumulate as micro
from jaxrl_llm import metrics as measure
from jaxrl_llm import world as outside
from jaxrl_llm.algorithm import Algorithm, layer_of, numbers, with_numbers
from jaxrl_llm.models.heads import Critic
from jaxrl_llm.models.packing import Room
from jaxrl_llm.needs import BATCH_SLOTS, Loss, Needs, keys_of, needs_of, of_recipe, stages_of
from jaxrl_llm.policy import Policy
from jaxrl_llm.sharding import as_state, of_state, on_all, on_mesh, over_data, place_state, rows_over
from jaxrl_llm.stages import write
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import (
    Batch,
    Learn,
    Learner,
    Metrics,
    Problem,
    Prompts,
    PyTree,
    Rollouts,
    Sampling,
    Scores,
    TrainState,
    World,
    split,
)
from jaxrl_llm.updates.optimizer import adamw

Models = tuple[dict[str, PyTree], dict[str, PyTree]]  # parameters and optimiser states by role
FROZEN = ("base", "reference", "lagged")  # roles without an optimiser


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
    mesh: Mesh | None = None,
) -> Learner:
    """The two functions of a run.

    Args:
      algorithm: the recipe.
      policy: the language model as functions.
      task: prompts and verifier.
      params: where the policy starts; `policy.init(key)` if None. Copied. For a policy with adapters (`models.lora`):
        those of its base, with adapters or without.
      reference: the reference policy; a copy of the starting policy if None. Kept only if the recipe reads it. For a
        policy with adapters: others on the same base.
      critic: needed by recipes that read values.
      optimizer: for the policy; `adamw(1e-6)` if None.
      critic_optimizer: for the critic; `adamw(1e-5)` if None.
      prompts_per_step: `B`.
      response_length: `T`, tokens; the task's if None.
      sampling: the behaviour distribution.
      accumulate: micro-batches per optimiser step; changes memory, not the result.
      verify: where a verifier that runs on the host is asked. "inside": by a callback, the step being one program.
        "between": the step is two programs (collect, learn) with the verifier between them.
      mesh: the devices, see `sharding.mesh`; the step's prompts are split over `data` and `fsdp`, its state as
          `sharding.TABLE` says. `init` makes it there.

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
    shards = rows_over(mesh)
    ask, example = outside.verifier(task, mesh), outside.example(task, prompts_per_step)

    def init(
        key: Array, needs: Needs, params: PyTree | None = params, reference: PyTree | None = reference
    ) -> TrainState:
        keys = split(key, "policy", "critic", "run")
        models = _policy_of(policy, keys["policy"], params)
        if needs.keeps_reference:
            models["reference"] = _copy(models["policy"] if reference is None else _reference_of(policy, reference))
        if needs.keeps_lagged:
            models["lagged"] = _copy(models["policy"])
        if needs.critic and critic is not None:
            models["critic"] = critic.init(keys["critic"])
        problem = Problem(
            rows=task.rows,
            prompts=prompts_per_step,
            length=length,
            vocab=policy.vocab,
            params=models,
            example=example,
            sampling=behaviour,
            width=policy.width,
        )
        trained = {role: optimizers[role].init(models[role]) for role in models if role not in FROZEN}
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=keys["run"],
            params=models,
            opt_state=jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), trained),
            memory={slot: _copy(stage.init(problem)) for slot, stage in stages_of(algorithm).items()},
            # Copies: a state is donated to its first step.
            numbers=_copy(numbers(algorithm)),
            sampling=_copy(behaviour),
        )

    # --- the step ----------------------------------------------------------------------------------------------------

    def collect(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Rollouts]:
        """Prompts and rollouts."""
        keys, memory = keys_of(state), dict(state.memory)
        stages = stages_of(with_numbers(algorithm, state.numbers))
        prompts = outside.draw(task, keys["draw"], prompts_per_step) if prompts is None else prompts
        if prompts.logged is None and task.demonstrate is not None:
            prompts = dataclasses.replace(prompts, logged=task.demonstrate(keys["logged"], prompts))
        prompts, memory["prompt"] = stages["prompt"].apply(memory["prompt"], keys["prompt"], over_data(mesh, prompts))
        rollouts, memory["rollout"] = stages["rollout"].apply(
            memory["rollout"], keys["rollout"], world_of(state), prompts
        )
        prompts = dataclasses.replace(rollouts.prompts, logged=None)  # rollouts alone read what was logged
        rollouts = over_data(mesh, dataclasses.replace(rollouts, prompts=prompts))
        return dataclasses.replace(state, memory=memory), rollouts

    def world_of(state: TrainState) -> World:
        return World(
            sample=functools.partial(outside.sample, policy, task, length, state),
            score=lambda role, rollouts: score(
                policy.whole(state.params, role), rollouts, frozenset({"logp", "entropy"})
            ),
            reward=functools.partial(ask, inside=verify == "inside"),
            models=state.params,
            step=state.step,
            length=length,
            sampling=state.sampling,
        )

    def learn(state: TrainState, rollouts: Rollouts, outcome: Array, needs: Needs) -> tuple[TrainState, Metrics]:
        """Rewards, credit, and the optimiser steps the recipe's update asks for."""
        keys, memory = keys_of(state), dict(state.memory)
        recipe = with_numbers(algorithm, state.numbers)
        stages = stages_of(recipe)
        batch, scored = outside.batch_of(rollouts, outcome, state.step)
        batch = with_roles(batch, state.params, needs, recipe)
        for slot in BATCH_SLOTS:
            output, memory[slot] = stages[slot].apply(memory[slot], keys[slot], batch)
            batch = write(slot, batch, output)
        loss = of_recipe(recipe, memory["loss"], keys["loss"])
        (models, measured), memory["update"] = stages["update"].apply(
            memory["update"],
            keys["update"],
            (state.params, state.opt_state),
            batch,
            trainer(state, recipe, loss, needs),
        )
        memory = {slot: stage.observe(memory[slot], batch) for slot, stage in stages.items()}
        new = dataclasses.replace(state, step=state.step + 1, params=models[0], opt_state=models[1], memory=memory)
        return as_state(mesh, new), on_all(mesh, {**measure.of_batch(batch, scored), **measured})

    def trainer(state: TrainState, recipe: Algorithm, loss: Loss, needs: Needs) -> Learn:
        """What the update slot is given."""

        def objective(models: Models, batch: Batch, other: Callable[..., Any] | None = None) -> Callable[..., Any]:
            terms, params = loss if other is None else Loss(other), models[0]

            def of(trained: dict[str, PyTree], part: Batch, room: Room | None = None) -> tuple[Array, Metrics]:
                now = {**params, **trained}
                there = others(state, now, part, needs)
                scores = score_current(now, part.rollouts, needs.current, recipe, there, room)
                if terms.prepare and accumulate == 1:
                    part = terms.prepared(jax.lax.stop_gradient(scores), part)
                value, found = terms(scores, part)
                return value, jax.lax.stop_gradient({**measure.of_scores(scores, part), **found})

            return of

        def whole(models: Models, batch: Batch, other: Callable[..., Any] | None = None) -> Batch:
            """With what is found on the whole step; shares are of it, so that its parts only add up."""
            terms = loss if other is None else Loss(other)
            batch = dataclasses.replace(batch, share=terms.aggregate(batch.mask))
            if not terms.prepare or accumulate == 1:
                return batch

            def score_part(part: Batch) -> Scores:
                return score_current(
                    models[0], part.rollouts, needs.prepare, recipe, others(state, models[0], part, needs)
                )

            return terms.prepared(jax.lax.stop_gradient(micro.mapped(score_part, batch, accumulate)), batch)

        def gradient(models: Models, batch: Batch, other: Callable[..., Any] | None = None) -> Any:
            trained = {role: models[0][role] for role in models[1]}
            batch = whole(models, batch, other)
            both = jax.value_and_grad(objective(models, batch, other), has_aux=True)

            def fitted(trained: dict[str, PyTree], part: Batch) -> Any:
                return policy.fitted(functools.partial(both, trained, part), part.rollouts, shards)

            (value, found), slopes = micro.value_and_grad(fitted, trained, batch, accumulate)
            slopes = as_state(mesh, slopes, "params")
            return (value, {"loss": value, **measure.summarise(found, batch)}), slopes

        def step(models: Models, batch: Batch, other: Callable[..., Any] | None = None) -> tuple[Models, Metrics]:
            (_, found), gradients = gradient(models, batch, other)
            (params, opt_state), norms = (dict(models[0]), dict(models[1])), {}
            for role, slope in gradients.items():
                change, opt_state[role] = optimizers[role].update(slope, opt_state[role], params[role])
                params[role] = optax.apply_updates(params[role], change)
                norms["grad_norm" if role == "policy" else f"grad_norm/{role}"] = optax.tree.norm(slope)
            return (params, opt_state), {**found, **norms}

        def scalar(models: Models, batch: Batch, other: Callable[..., Any] | None = None) -> Callable[..., Any]:
            batch = whole(models, batch, other)
            return lambda trained: objective(models, batch, other)(trained, batch)

        def fresh(models: Models, rollouts: Rollouts) -> Batch:
            batch, _ = outside.batch_of(rollouts, ask(rollouts, inside=verify == "inside"), state.step)
            return with_roles(batch, models[0], needs, recipe)

        def world(models: Models) -> World:
            return world_of(dataclasses.replace(state, params=models[0]))

        return Learn(step=step, objective=scalar, gradient=gradient, world=world, batch=fresh)

    # --- likelihoods and values --------------------------------------------------------------------------------------

    def score(params: PyTree, rollouts: Rollouts, fields: frozenset[str], recipe: Algorithm = algorithm) -> Scores:
        """In as many parts as the gradient, so that it needs no more memory."""
        of = functools.partial(policy.score, params, fields=fields, measures=recipe.measures)

        def fitted(rollouts: Rollouts) -> Scores:
            return policy.fitted(lambda room: of(rollouts, **in_room(room)), rollouts, shards)

        return micro.mapped(fitted, rollouts, accumulate)

    def score_current(
        params: dict[str, PyTree],
        rollouts: Rollouts,
        fields: frozenset[str],
        recipe: Algorithm = algorithm,
        others: dict[str, Any] | None = None,
        room: Room | None = None,
    ) -> Scores:
        now = policy.whole(params)
        of = functools.partial(policy.score, now, rollouts, measures=recipe.measures, others=others)
        of = functools.partial(of, **in_room(room))
        if "value" not in fields or critic is None:
            return of(fields=fields)
        value = functools.partial(critic.value, critic.whole(params))
        if critic.shared:
            return of(fields=fields, heads={"value": value})
        return dataclasses.replace(of(fields=fields - {"value"}), value=value(rollouts))

    def others(state: TrainState, now: dict[str, PyTree], part: Batch, needs: Needs) -> dict[str, tuple[PyTree, Array]]:
        """Parameters and hidden states of the roles whose logits the recipe's measures ask for."""
        frozen = jax.lax.stop_gradient(state.params)
        models = {**frozen, "old": frozen["policy"], "teacher": frozen.get("reference")}
        models |= {"elsewhere": now["policy"], "inner": now["policy"]}
        found = {}
        for role in sorted(needs.others):
            rollouts, params = part.rollouts, policy.whole(models, role)
            if role in ("teacher", "elsewhere"):
                if rollouts.teacher is None:
                    raise ValueError(f"a measure asks for {role!r}, and the rollout slot set no rollouts.teacher")
                rollouts = dataclasses.replace(rollouts, context=rollouts.teacher)
            layer = {"layer": layer_of(algorithm.measures)} if role == "inner" else {}
            found[role] = params, policy.hidden(params, rollouts, **layer)
        return found

    def with_roles(batch: Batch, params: dict[str, PyTree], needs: Needs, recipe: Algorithm) -> Batch:
        """What other models, and the policy before its update, say of the rollouts: only what the recipe reads."""
        rollouts = batch.rollouts
        if needs.old:
            batch = dataclasses.replace(batch, old=score(policy.whole(params), rollouts, needs.old, recipe))
        if needs.reference:
            known = score(policy.whole(params, "reference"), rollouts, needs.reference, recipe)
            batch = dataclasses.replace(batch, reference=known)
        if needs.value:
            only = functools.partial(score_current, params, fields=frozenset({"value"}))
            batch = dataclasses.replace(batch, value=micro.mapped(only, rollouts, accumulate).value)
        return jax.lax.stop_gradient(batch)

    # --- what is given out -------------------------------------------------------------------------------------------

    needs = needs_of(algorithm, policy, functools.partial(init, needs=Needs()), collect, example)
    if needs.critic and critic is None:
        raise ValueError(
            "this recipe reads values (batch.value or scores.value) and has no critic: pass critic=heads.critic(model) "
            "or critic=heads.value_head(width)"
        )

    first, second = on_mesh(mesh, collect), on_mesh(mesh, functools.partial(learn, needs=needs))

    def step(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        state, rollouts = first(state, prompts)
        return second(state, rollouts, ask(rollouts, inside=True))

    first_alone, second_alone = jax.jit(first), jax.jit(second)

    def step_in_two(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        state, rollouts = first_alone(state, prompts)
        found: tuple[TrainState, Metrics] = second_alone(state, rollouts, ask(rollouts, inside=False))
        return found

    def start(key: Array) -> TrainState:
        made = functools.partial(init, needs=needs)
        if mesh is None:
            return made(key)
        where = of_state(mesh, jax.eval_shape(made, key))
        given = {"params": params, "reference": reference}
        given = {name: place_state(mesh, tree, "params") for name, tree in given.items()}
        state: TrainState = jax.jit(made, out_shardings=where)(key, **given)
        return state

    inside = verify == "inside"
    return Learner(start, step if inside else step_in_two, compiled=inside)


def _policy_of(policy: Policy, key: Array, params: PyTree | None) -> dict[str, PyTree]:
    """The role "policy" at the start, and the base it stands on if it is adapters."""
    given = policy.init(key) if params is None else params
    if policy.adapter is None:
        return {"policy": given if params is None else _copy(given)}
    own = policy.adapter.own(given)
    return {"base": policy.adapter.base(given), "policy": policy.adapter.fresh(key) if own is None else _copy(own)}


def _reference_of(policy: Policy, given: PyTree) -> PyTree:
    own = given if policy.adapter is None else policy.adapter.own(given)
    if own is None:
        raise ValueError("reference has no adapters: the roles of a policy with adapters share its base, pass theirs")
    return own


def in_room(room: Room | None) -> dict[str, Room]:
    """As a keyword; policies that do not pack need not know it."""
    return {} if room is None else {"room": room}


def _strong(x: Any) -> Array:
    """An array of 32 bits and no weak type: replacing it by another one compiles nothing."""
    return jnp.asarray(x, jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.int32)


def _copy(tree: PyTree) -> PyTree:
    """Buffers of its own, to be donated, and no weak types."""

    def own(x: Any) -> Array:
        x = jnp.array(x)
        return x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jax.lax.convert_element_type(x, x.dtype)

    return jax.tree.map(own, tree)
