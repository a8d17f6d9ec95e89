"""From what a recipe puts in a slot to what the engine runs there."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import SLOTS, Chain
from jaxrl_llm.rewards.basic import at_last_token
from jaxrl_llm.types import Batch, Memory, Problem, Prompts, Stage, masked


def through(algorithm: Any, batch: Batch, key: Array) -> Batch:
    """`batch` after the reward, filter, advantage and weight slots of a recipe whose slots remember nothing.

    Raises:
      ValueError: one of them is a stage with memory.
    """
    slots = ("reward", "filter", "advantage", "weight")
    for slot, k in zip(slots, jax.random.split(key, len(slots)), strict=True):
        stage = lift(slot, getattr(algorithm, slot))
        if isinstance(getattr(algorithm, slot), Stage):
            raise ValueError(f"through: the {slot} slot remembers, and nobody would keep its memory")
        output, _ = stage.apply(stage.init(None), k, batch)  # type: ignore[arg-type]
        batch = write(slot, batch, output)
    return batch


def lift(slot: str, value: Any) -> Stage:
    """Any function, `Stage` or `Chain` as a `Stage`; a plain function remembers nothing."""
    if isinstance(value, Stage):
        return value
    if isinstance(value, Chain):
        return _lift_chain(slot, [lift(slot, stage) for stage in value.stages])
    keyed = SLOTS[slot].index("key") if "key" in SLOTS[slot] else None

    def apply(memory: Memory, key: Array, *inputs: Any) -> tuple[Any, Memory]:
        if keyed is not None:
            inputs = (*inputs[:keyed], key, *inputs[keyed:])
        return value(*inputs), memory

    return Stage(apply=apply)


def _lift_chain(slot: str, stages: list[Stage]) -> Stage:
    def init(problem: Problem) -> Memory:
        return tuple(stage.init(problem) for stage in stages)

    def apply(memory: Memory, key: Array, x: Any) -> tuple[Any, Memory]:
        new = []
        for stage, old, k in zip(stages, memory, jax.random.split(key, len(stages)), strict=True):
            output, kept = stage.apply(old, k, x)
            x = write(slot, x, output)
            new.append(kept)
        return (x if slot == "prompt" else _field(slot, x)), tuple(new)

    def observe(memory: Memory, batch: Batch) -> Memory:
        return tuple(stage.observe(old, batch) for stage, old in zip(stages, memory, strict=True))

    return Stage(init=init, apply=apply, observe=observe)


def _field(slot: str, batch: Batch) -> Any:
    if slot == "weight":
        return batch.weight, batch.select
    return {"reward": batch.token_reward, "filter": batch.keep, "advantage": batch.advantage}[slot]


def write(slot: str, x: Any, output: Any) -> Any:
    """The batch with a slot's output in its field: masked, without gradient, per token where the field is per token.

    Raises:
      ValueError: an output of the wrong shape, naming slot and shapes.
    """
    if slot == "prompt":
        if not isinstance(output, Prompts):
            raise ValueError(f"the prompt slot must return Prompts, got {type(output).__name__}")
        return output
    batch: Batch = x
    if isinstance(output, tuple) and slot == "weight":  # a chain's: factors and selection
        for part in output:
            batch = batch if part is None else write(slot, batch, part)
        return batch
    per_row, per_token = batch.rollouts.tokens.shape[:2], batch.rollouts.tokens.shape
    output = jax.lax.stop_gradient(jnp.asarray(output))
    allowed = {"filter": (per_row,)}.get(slot, (per_row, per_token))
    if output.shape not in allowed:
        raise ValueError(f"the {slot} slot must return {' or '.join(map(str, allowed))}, got {output.shape}")

    if slot == "filter":
        old = True if batch.keep is None else batch.keep
        return dataclasses.replace(batch, keep=output.astype(bool) & old)
    if slot == "weight" and output.dtype == bool:
        chosen = jnp.broadcast_to(output if output.ndim == 3 else output[..., None], per_token)
        return dataclasses.replace(batch, select=chosen if batch.select is None else chosen & batch.select)
    output = output.astype(jnp.float32)
    if slot == "reward":
        per = output if output.ndim == 3 else at_last_token(batch.mask, output)
        per = masked(batch.mask, per)
        total = per.sum(-1) if output.ndim == 3 else masked(batch.rows, output)
        return dataclasses.replace(batch, reward=total, token_reward=per)
    spread = masked(batch.mask, jnp.broadcast_to(output if output.ndim == 3 else output[..., None], per_token))
    if slot == "weight" and batch.weight is not None:
        spread = spread * batch.weight
    if slot == "weight":
        return dataclasses.replace(batch, weight=spread)
    return dataclasses.replace(batch, advantage=spread)
