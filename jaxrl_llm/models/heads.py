"""Scalars on a trunk: critics (one value per token) and reward models (one per response).

Heads start at zero. Then the first advantages are the plain returns, not a random function of the text, the gradient of
a random head does not disturb a trunk shared with the policy, and a reward model prefers nobody at first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.model import Adapter, Model, inputs_of, prefix_of
from jaxrl_llm.models.packing import Packing
from jaxrl_llm.types import Context, PyTree, Rollouts, masked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Critic:
    """A value function.

    init: `(key) -> params`.
    value: if `shared`, `(params, hidden [... D]) -> [...]` on the policy's own hidden states, else
        `(params, rollouts) -> [B G T]`, 0 where not `rollouts.scored`. Position `t` is the state before token `t`.
    shared: whether the policy's trunk is the critic's too.
    adapter: of a trunk that is adapters on the policy's base; then `init` makes those alone, and `whole` both.
    """

    init: Callable[[Array], PyTree]
    value: Callable[..., Array]
    shared: bool
    adapter: Adapter | None = None

    def whole(self, params: Mapping[str, PyTree]) -> PyTree:
        """What `value` takes, of parameters by role."""
        own = params["critic"]
        return own if self.adapter is None else {**own, "trunk": self.adapter.join(params["base"], own["trunk"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A learned reward: `init(key) -> params`, `reward(params, rollouts) -> [B G]`, of the finished response."""

    init: Callable[[Array], PyTree]
    reward: Callable[..., Array]


def value_head(width: int) -> Critic:
    """A linear value on the policy's trunk; `width` is the model's."""
    return Critic(init=functools.partial(_init_head, width), value=linear, shared=True)


def critic(model: Model) -> Critic:
    """A critic with a trunk of its own; parameters `{"trunk": model's, "head": ...}`.

    If the model has adapters, its trunk is adapters of its own on the policy's base.
    """
    start = model if model.adapter is None else dataclasses.replace(model, init=model.adapter.fresh)
    return Critic(
        init=functools.partial(_init_both, start),
        value=functools.partial(_value, model),
        shared=False,
        adapter=model.adapter,
    )


def reward_model(model: Model) -> RewardModel:
    """A scalar read at the last attended token of a response; parameters as `critic`'s."""
    return RewardModel(init=functools.partial(_init_both, model), reward=functools.partial(_reward, model))


def linear(params: PyTree, hidden: Array) -> Array:
    """`[... D] -> [...]` float32."""
    value: Array = jnp.dot(hidden.astype(jnp.float32), params["kernel"]) + params["bias"]
    return value


def _init_head(width: int, key: Array) -> PyTree:
    del key  # zeros: see the top of this file
    return {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}


def _init_both(model: Model, key: Array) -> PyTree:
    trunk, head = jax.random.split(key)
    return {"trunk": model.init(trunk), "head": _init_head(model.width, head)}


def hidden_states(
    model: Model,
    params: PyTree,
    rollouts: Rollouts,
    *,
    after: bool = False,
    layer: int | None = None,
    packing: Packing | None = None,
) -> Array:
    """Final hidden states `[B G T D]` before each response token; `after` adds the one after the last, `[B G T+1 D]`.

    With `layer`, those that this layer leaves, without the final norm. A context is encoded once for the `G / C`
    responses that share it. Arbitrary at padding. With `packing`, those of the tokens it holds, `[shards N D]`.

    Raises:
      ValueError: the contexts do not divide the group; there is no such layer.
    """
    if layer is not None and model.inner is None:
        raise ValueError(f"layer {layer} was asked for, and this model shows no layers (Model.inner)")
    states = model.hidden if layer is None or model.inner is None else functools.partial(model.inner, layer=layer)
    (b, g, t), (contexts, s) = rollouts.tokens.shape, rollouts.context.tokens.shape[1:]
    if g % contexts:
        raise ValueError(f"rollouts.context has {contexts} contexts for groups of {g}: it must be 1 or the group size")
    grouped = (b * contexts, g // contexts, t)
    tokens, attended = rollouts.tokens.reshape(grouped), rollouts.attended.reshape(grouped)
    if after:
        more = [(0, 0), (0, 0), (0, 1)]
        tokens, attended = jnp.pad(tokens, more), jnp.pad(attended, more)
    context = Context(tokens=rollouts.context.tokens.reshape(-1, s), mask=rollouts.context.mask.reshape(-1, s))
    prefix, offset, last = prefix_of(context)
    if packing is not None:
        if model.packed is None:
            raise ValueError("this model cannot score packed tokens (Model.packed)")
        return model.packed(params, prefix, offset, inputs_of(last, tokens, attended), attended, packing=packing)
    hidden = states(params, prefix, offset, inputs_of(last, tokens, attended), attended)
    return hidden.reshape(b, g, *hidden.shape[2:])


def _value(model: Model, params: PyTree, rollouts: Rollouts) -> Array:
    hidden = masked(rollouts.scored[..., None], hidden_states(model, params["trunk"], rollouts))
    return masked(rollouts.scored, linear(params["head"], hidden))


def _reward(model: Model, params: PyTree, rollouts: Rollouts) -> Array:
    hidden = hidden_states(model, params["trunk"], rollouts, after=True)
    attended = rollouts.attended
    # Input 0 is the context's last token, so the state after the last attended token t stands at t + 1.
    end = jnp.max(jnp.where(attended, jnp.arange(1, attended.shape[-1] + 1), 0), axis=-1)
    last = jnp.take_along_axis(hidden, end[..., None, None], axis=-2)[..., 0, :]
    return linear(params["head"], last)
