"""A model whose tokens another set of its parameters allows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.model import Model
from jaxrl_llm.types import PyTree

FAR = -1e30  # the logit of a token that is not allowed: finite, so that 0 * FAR is 0


def restricted(model: Model, allow: Callable[[Array], Array]) -> Model:
    """`model` under parameters `(own, other)`: the own logits of the tokens in `allow(other logits)`, `FAR` elsewhere.

    Both read the same text, each with a cache of its own.

    Args:
      model: both are it.
      allow: `(logits [... V]) -> [... V]` bool, some of them True.
    """
    width = model.width

    def each(function: Callable[..., Any], params: tuple[PyTree, PyTree], *args: Any) -> tuple[Any, Any]:
        return function(params[0], *args), function(params[1], *args)

    def hidden(params: tuple[PyTree, PyTree], *args: Any) -> Array:
        return jnp.concatenate(each(model.hidden, params, *args), -1)

    def logits(params: tuple[PyTree, PyTree], hidden: Array) -> Array:
        allowed = allow(model.logits(params[1], hidden[..., width:]))
        return jnp.where(allowed, model.logits(params[0], hidden[..., :width]), FAR)

    def decode(
        decoders: tuple[Any, Any], prefix: tuple[Any, Any], mask: Array, cache: tuple[Any, Any], *args: Any, **kw: Any
    ) -> tuple[Array, Any]:
        (own, mine), (other, its) = (
            model.decode(d, p, mask, c, *args, **kw) for d, p, c in zip(decoders, prefix, cache, strict=True)
        )
        return jnp.concatenate([own, other], -1), (mine, its)

    return Model(
        vocab=model.vocab,
        width=2 * width,
        init=lambda key: (params := model.init(key), params),
        hidden=hidden,
        logits=logits,
        prefill=functools.partial(each, model.prefill),
        decoder=functools.partial(each, model.decoder),
        empty=lambda m, r, t: (model.empty(m, r, t), model.empty(m, r, t)),
        decode=decode,
    )
