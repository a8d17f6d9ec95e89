"""The one compiled step: prompts, rollouts, rewards, credit, loss and optimiser as one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrl_llm import metrics as measure
from jaxrl_llm.algorithm import Algorithm, numbers, with_numbers
from jaxrl_llm.liveness import reads
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.models.heads import Critic
from jaxrl_llm.policy import EXTRAS, Policy
from jaxrl_llm.stages import lift, write
from jaxrl_llm.tasks.task import Task, host_verifier
from jaxrl_llm.types import (
    PADDING,
    POLICY,
    Batch,
    Context,
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

STAGES = ("prompt", "rollout", "reward", "filter", "advantage", "weight", "loss", "update")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a recipe reads, found by tracing it; nothing else is computed, and no other model is kept."""

    current: frozenset[str]
    old: frozenset[str]
    reference: frozenset[str]
    value: bool

    @property
    def roles(self) -> tuple[str, ...]:
        return ("policy", *(["reference"] if self.reference else []), *(["critic"] if self.critic else []))

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
    constrain: Callable[[Any], Any] = lambda prompts: prompts,
) -> Learner:
    """The two functions of a run.

    Args:
      algorithm: the recipe.
      policy: the language model as functions.
      task: prompts and verifier.
      params: where the policy starts; `policy.init(key)` if None.
      reference: the reference policy; a copy of the starting policy if None. Kept only if the recipe reads it.
      critic: needed by recipes that read values.
      optimizer: for the policy; `adamw(1e-6)` if None. An optimiser that takes the loss's arguments is not supported.
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
      ValueError: the recipe reads values and there is no critic; a batch that does not divide; a task that cannot be
        drawn from inside the step.
    """
    length = task.response_length if response_length is None else response_length
    optimizers = {"policy": optimizer or adamw(1e-6), "critic": critic_optimizer or adamw(1e-5)}
    sampling = jax.tree.map(_strong, sampling or Sampling())
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    if verify not in ("inside", "between"):
        raise ValueError(f"verify must be 'inside' or 'between', got {verify!r}")
    ask = _verifier(task)

    # --- models ------------------------------------------------------------------------------------------------------

    def score(role: str, params: PyTree, rollouts: Rollouts, fields: frozenset[str]) -> Scores:
        """Scores of one model, in as many parts as the gradient is accumulated in, so that it needs no more memory."""
        one = functools.partial(policy.score, params, fields=fields)
        if accumulate == 1:
            return one(rollouts)
        return _join(jax.lax.map(one, _parts(rollouts, accumulate)))

    def values(params: dict[str, PyTree], rollouts: Rollouts) -> Array:
        assert critic is not None
        if not critic.shared:
            one = functools.partial(critic.value, params["critic"])
        else:
            heads = {"value": functools.partial(critic.value, params["critic"])}
            one = lambda r: policy.score(params["policy"], r, fields=frozenset({"value"}), heads=heads).value  # noqa: E731
        return one(rollouts) if accumulate == 1 else _join(jax.lax.map(one, _parts(rollouts, accumulate)))

    def score_current(params: dict[str, PyTree], rollouts: Rollouts, fields: frozenset[str]) -> Scores:
        if "value" not in fields:
            return policy.score(params["policy"], rollouts, fields=fields)
        assert critic is not None
        head = functools.partial(critic.value, params["critic"])
        if critic.shared:
            return policy.score(params["policy"], rollouts, fields=fields, heads={"value": head})
        scores = policy.score(params["policy"], rollouts, fields=fields - {"value"})
        return dataclasses.replace(scores, value=head(rollouts))

    # --- the step ----------------------------------------------------------------------------------------------------

    def collect(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Rollouts]:
        """Prompts and rollouts."""
        keys = _keys(state)
        stages = _lifted(with_numbers(algorithm, state.numbers))
        memory = dict(state.memory)
        if prompts is None:
            prompts = _draw(task, keys["draw"], prompts_per_step)
        if prompts.logged is None and task.demonstrate is not None:
            prompts = dataclasses.replace(prompts, logged=task.demonstrate(keys["logged"], prompts))
        prompts = constrain(prompts)
        prompts, memory["prompt"] = stages["prompt"].apply(memory["prompt"], keys["prompt"], prompts)
        world = World(
            sample=functools.partial(_sample, policy, state, task, length),
            score=lambda role, rollouts: score(role, state.params[role], rollouts, frozenset({"logp", "entropy"})),
            reward=lambda rollouts: ask(rollouts, inside=verify == "inside"),
            models=state.params,
            step=state.step,
        )
        rollouts, memory["rollout"] = stages["rollout"].apply(memory["rollout"], keys["rollout"], world, prompts)
        prompts = dataclasses.replace(rollouts.prompts, logged=None)  # read only by rollouts
        return dataclasses.replace(state, memory=memory), dataclasses.replace(rollouts, prompts=prompts)

    def learn(state: TrainState, rollouts: Rollouts, outcome: Array, needs: Needs) -> tuple[TrainState, Metrics]:
        """Rewards, credit, and the optimiser steps the recipe's update asks for."""
        keys = _keys(state)
        stages = _lifted(with_numbers(algorithm, state.numbers))
        memory = dict(state.memory)

        batch, scored = _batch(rollouts, outcome, state.step)
        if needs.old:
            batch = dataclasses.replace(batch, old=score("policy", state.params["policy"], rollouts, needs.old))
        if needs.reference:
            fields = needs.reference
            batch = dataclasses.replace(batch, reference=score("reference", state.params["reference"], rollouts, fields))
        if needs.value:
            batch = dataclasses.replace(batch, value=values(state.params, rollouts))
        batch = jax.lax.stop_gradient(batch)

        for slot in ("reward", "filter", "advantage", "weight"):
            output, memory[slot] = stages[slot].apply(memory[slot], keys[slot], batch)
            batch = write(slot, batch, output)

        optimise = functools.partial(_optimise, stages["loss"], memory["loss"], keys["loss"], needs)
        (models, measured), memory["update"] = stages["update"].apply(
            memory["update"], keys["update"], (state.params, state.opt_state), batch, optimise
        )
        for slot in STAGES:
            memory[slot] = stages[slot].observe(memory[slot], batch)
        new = dataclasses.replace(
            state, step=state.step + 1, params=models[0], opt_state=models[1], memory=memory
        )
        return new, {**measure.of_batch(batch, scored), **measured}

    def _optimise(
        loss: Any, memory: Any, key: Array, needs: Needs, models: tuple[Any, Any], batch: Batch
    ) -> tuple[Any, Metrics]:
        """One optimiser step. Shares are of the whole step, so parts only add up."""
        params, opt_state = models
        batch = dataclasses.replace(batch, share=_aggregate(algorithm.loss)(batch.mask))
        trained = {role: params[role] for role in opt_state}

        def objective(trained: dict[str, PyTree], part: Batch) -> tuple[Array, Metrics]:
            scores = score_current({**params, **trained}, part.rollouts, needs.current)
            (value, found), _ = loss.apply(memory, key, scores, part)
            return value, {**measure.of_scores(jax.lax.stop_gradient(scores), part), **jax.lax.stop_gradient(found)}

        (value, found), gradient = _accumulated(objective, trained, batch, accumulate)
        new_params, new_state = dict(params), dict(opt_state)
        norms = {}
        for role, grad in gradient.items():
            update, new_state[role] = optimizers[role].update(grad, opt_state[role], params[role])
            new_params[role] = optax.apply_updates(params[role], update)
            norms["grad_norm" if role == "policy" else f"grad_norm/{role}"] = optax.tree.norm(grad)
        return (new_params, new_state), {"loss": value, **norms, **measure.summarise(found, batch)}

    # --- what is given out -------------------------------------------------------------------------------------------

    def init_with(needs: Needs, key: Array) -> TrainState:
        keys = split(key, "policy", "critic", "run")
        models = {"policy": policy.init(keys["policy"]) if params is None else jax.tree.map(jnp.array, params)}
        if needs.reference:
            models["reference"] = jax.tree.map(jnp.array, models["policy"] if reference is None else reference)
        if needs.critic:
            assert critic is not None
            models["critic"] = critic.init(keys["critic"])
        problem = Problem(
            rows=task.rows, prompts=prompts_per_step, length=length, vocab=policy.vocab, params=models
        )
        stages = _lifted(algorithm)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            key=keys["run"],
            params=models,
            opt_state={
                role: jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), optimizers[role].init(models[role]))
                for role in models
                if role != "reference"
            },
            memory={slot: stages[slot].init(problem) for slot in STAGES},
            # Copies: a state is donated to its first step.
            numbers=jax.tree.map(jnp.array, numbers(algorithm)),
            sampling=jax.tree.map(jnp.array, sampling),
        )

    def needs_of(prompts: PyTree) -> Needs:
        """Traces the recipe on abstract data and sees which scores it reads."""
        everything = Needs(frozenset(), frozenset(), frozenset(), value=False)
        state = jax.eval_shape(functools.partial(init_with, everything), jax.random.key(0))
        state, rollouts = jax.eval_shape(collect, state, prompts)
        token = jax.ShapeDtypeStruct(rollouts.tokens.shape, jnp.float32)
        some = Scores(logp=token, entropy=token, extras=dict.fromkeys(EXTRAS, token))

        def recipe(state: TrainState, rollouts: Rollouts, roles: dict[str, Any]) -> Any:
            stages = _lifted(algorithm)
            batch, _ = _batch(rollouts, jnp.zeros(rollouts.tokens.shape[:2]), state.step)
            batch = dataclasses.replace(batch, **{k: v for k, v in roles.items() if k != "current"})
            keys, outputs = _keys(state), []
            for slot in ("reward", "filter", "advantage", "weight"):
                output, memory = stages[slot].apply(state.memory[slot], keys[slot], batch)
                batch = write(slot, batch, output)
                outputs += [output, memory]
            batch = dataclasses.replace(batch, share=_aggregate(algorithm.loss)(batch.mask))
            (value, found), _ = stages["loss"].apply(state.memory["loss"], keys["loss"], roles["current"], batch)
            # Metrics alone do not make a recipe pay for a role.
            return value, outputs, [stages[slot].observe(state.memory[slot], batch) for slot in STAGES]

        roles = {
            "current": dataclasses.replace(some, value=token), "old": some, "reference": some, "value": token,
        }
        _, _, read = reads(recipe, state, rollouts, roles)
        fields = {role: _fields(read[role]) for role in ("current", "old", "reference")}
        return Needs(**fields, value=read["value"])

    needs = needs_of(_abstract_prompts(task, prompts_per_step))
    if needs.critic and critic is None:
        raise ValueError(
            "this recipe reads values (batch.value or scores.value) and has no critic: pass critic=heads.critic(model) "
            "or critic=heads.value_head(width)"
        )
    init = functools.partial(init_with, needs)
    if verify == "inside":

        def step(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
            state, rollouts = collect(state, prompts)
            return learn(state, rollouts, ask(rollouts, inside=True), needs)

        return Learner(init, step)

    first = jax.jit(collect)
    second = jax.jit(functools.partial(learn, needs=needs), donate_argnums=0)

    def step_between(state: TrainState, prompts: Prompts | None = None) -> tuple[TrainState, Metrics]:
        state, rollouts = first(state, prompts)
        return second(state, rollouts, jnp.asarray(ask(rollouts, inside=False)))

    return Learner(init, step_between, compiled=False)


# --- parts of the step that know nothing of a run -----------------------------------------------------------------------


def _strong(x: Any) -> Array:
    """An array of 32 bits and no weak type: replacing it by another one compiles nothing."""
    return jnp.asarray(x, jnp.float32 if jnp.issubdtype(jnp.result_type(x), jnp.floating) else jnp.int32)


def _keys(state: TrainState) -> dict[str, Array]:
    return split(jax.random.fold_in(state.key, state.step), "draw", "logged", *STAGES)


def _lifted(algorithm: Algorithm) -> dict[str, Any]:
    return {slot: lift(slot, getattr(algorithm, slot)) for slot in STAGES}


def _aggregate(loss: Any) -> Callable[[Array], Array]:
    return getattr(loss, "aggregate", token_mean)


def _fields(read: Scores) -> frozenset[str]:
    named = {"logp": read.logp, "entropy": read.entropy, "value": read.value, **read.extras}
    return frozenset(name for name, was_read in named.items() if was_read)


def _draw(task: Task, key: Array, n: int) -> Prompts:
    if task.draw is None:
        raise ValueError(
            f"task {task.name!r} has no in-graph prompts: pass them, step(state, prompts), from task.batches(seed, n)"
        )
    return task.draw(key, n)


def _abstract_prompts(task: Task, n: int) -> PyTree:
    if task.draw is not None:
        return jax.eval_shape(functools.partial(task.draw, n=n), jax.random.key(0))
    if task.batches is None:
        raise ValueError(f"task {task.name!r} has neither draw nor batches: it cannot give prompts")
    example = next(iter(task.batches(0, n)))
    return jax.eval_shape(lambda x: x, example)


def _sample(
    policy: Policy,
    state: TrainState,
    task: Task,
    length: int,
    key: Array,
    prompts: Prompts,
    size: int,
    context: Context | None = None,
    sampling: Sampling | None = None,
) -> Rollouts:
    """`World.sample`. Row `(b, g)` has a key of its own that depends on neither `B` nor `size`."""
    b = prompts.index.shape[0]
    if context is None:
        context = jax.tree.map(lambda x: x[:, None], prompts.context)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    keys = jax.vmap(fold, in_axes=(0, None))(fold(key, jnp.arange(b)), jnp.arange(size))
    sampling = jax.tree.map(lambda x: jnp.broadcast_to(x, (b, size)), state.sampling if sampling is None else sampling)
    samples = policy.sample(
        state.params["policy"], keys, context, sampling,
        length=length, eos=(task.tokenizer.eos_token_id,), stop=task.stop,
    )
    return Rollouts(
        prompts=prompts,
        context=context,
        tokens=samples.tokens,
        mask=samples.mask,
        role=jnp.where(samples.mask, POLICY, PADDING).astype(jnp.int8),
        logp=samples.logp,
        entropy=samples.entropy,
        version=jnp.broadcast_to(state.step, samples.tokens.shape),
        truncated=samples.truncated,
        sampling=sampling,
    )


def _verifier(task: Task) -> Callable[..., Array]:
    """`(rollouts, inside) -> [B G]` float32, NaN where a row cannot be scored."""

    def ask(rollouts: Rollouts, *, inside: bool) -> Array:
        if rollouts.outcome is not None:
            return rollouts.outcome
        asked = (rollouts.prompts, rollouts.tokens, rollouts.mask)
        if task.verify is not None:
            return task.verify(*asked)
        host = host_verifier(task)
        if inside:
            shape = jax.ShapeDtypeStruct(rollouts.tokens.shape[:2], jnp.float32)
            return jax.pure_callback(host, shape, *asked, vmap_method="sequential")
        if isinstance(rollouts.tokens, jax.core.Tracer):
            raise ValueError("this rollout asks the verifier while it samples: use verify='inside'")
        return host(*jax.tree.map(np.asarray, asked))

    return ask


def _batch(rollouts: Rollouts, outcome: Array, step: Array) -> tuple[Batch, Array]:
    """The batch before any slot ran, and `[B G]` the rows that have tokens and a score."""
    exists = rollouts.mask.any(-1)
    scored = ~jnp.isnan(outcome) & exists
    outcome = jnp.where(scored, outcome, 0.0)
    # Tokens nobody attends to are whatever padding the rollout left; behaviour of unchosen tokens is undefined.
    rollouts = dataclasses.replace(
        rollouts,
        tokens=jnp.where(rollouts.attended, rollouts.tokens, 0),
        logp=jnp.where(rollouts.mask, rollouts.logp, 0.0),
        entropy=jnp.where(rollouts.mask, rollouts.entropy, 0.0),
    )
    return Batch(rollouts=rollouts, step=step, outcome=outcome, keep=scored), scored


def _parts(tree: PyTree, n: int) -> PyTree:
    """`[n, B / n, ...]`: part `i` holds prompts `i, i + n, ...`, so that every device keeps its share of each part."""

    def cut(x: Array) -> Array:
        if x.ndim == 0:
            return jnp.broadcast_to(x, (n,))
        if x.shape[0] % n:
            raise ValueError(f"{x.shape[0]} prompts do not divide into {n} micro-batches (accumulate={n})")
        return x.reshape(x.shape[0] // n, n, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(cut, tree)


def _join(tree: PyTree) -> PyTree:
    """Undoes `_parts`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), tree)


def _accumulated(
    objective: Callable[..., tuple[Array, Metrics]], params: PyTree, batch: Batch, n: int
) -> tuple[tuple[Array, Metrics], PyTree]:
    """Value, metrics and gradient of a sum over prompts, `n` parts one after the other."""
    both = jax.value_and_grad(objective, has_aux=True)
    if n == 1:
        return both(params, batch)

    def body(carry: tuple[Array, PyTree], part: Batch) -> tuple[Any, Metrics]:
        (value, found), gradient = both(params, part)
        return jax.tree.map(jnp.add, carry, (value, gradient)), found

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (value, gradient), found = jax.lax.scan(body, zero, _parts(batch, n))
    return (value, {k: x.sum(0) if x.ndim == 1 else _join(x) for k, x in found.items()}), gradient
