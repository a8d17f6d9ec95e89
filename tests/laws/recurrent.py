"""A language model that compiles in a fraction of a transformer's time: the laws compile hundreds of programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxrl_llm.models.model import Model


def recurrent(vocab: int, *, width: int = 8) -> Model:
    """`hidden_t = tanh(E[x_t] + sum_{s <= t} C[x_s])`: it remembers its whole context, in one vector."""

    def init(key):
        keys = jax.random.split(key, 3)
        shapes = {"now": (vocab, width), "past": (vocab, width), "out": (width, vocab)}
        return {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}

    def prefill(params, prefix):
        return jnp.sum(jnp.where(prefix.mask[..., None], params["past"][prefix.tokens], 0), -2)

    def hidden(params, prefix, offset, inputs, attended):
        past = prefill(params, prefix)[:, None, None] + jnp.cumsum(params["past"][inputs], -2)
        return jnp.tanh(params["now"][inputs] + past)

    def inner(params, prefix, offset, inputs, attended, *, layer):
        return params["now"][inputs]

    def decode(params, prefix, mask, cache, offset, inputs, t, column=None):
        begins = jnp.broadcast_to(t == 0, inputs.shape)[..., None]
        past = jnp.where(begins, prefix[:, None], cache) + params["past"][inputs]
        return jnp.tanh(params["now"][inputs] + past), past

    return Model(
        vocab=vocab,
        width=width,
        init=init,
        hidden=hidden,
        inner=inner,
        logits=lambda params, hidden: hidden @ params["out"],
        prefill=prefill,
        decoder=lambda params: params,
        empty=lambda m, r, t: jnp.zeros((m, r, width)),
        decode=decode,
    )
