"""An nnx module as a model: its decoding, its grouped pass and its plain pass agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_llm.models.model import inputs_of, prefix_of
from jaxrl_llm.models.nnx import nnx_model
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import Context, Sampling

M, S, R, T, V, D = 2, 4, 2, 3, 9, 8


class Net(nnx.Module):
    """One attention layer that sees absolute positions, so that a wrong position or a seen gap shows."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.place = nnx.Embed(32, D, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(3)])
        self.out = nnx.Linear(D, V, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros(()))

    def __call__(self, tokens, positions, mask):
        x = self.embed(tokens) + self.place(positions)
        q, k, v = (layer(x) for layer in self.layers)
        seen = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool)) & mask[:, None, :]
        weight = jax.nn.softmax(jnp.where(seen, 3 * q @ k.swapaxes(1, 2), -1e30), axis=-1)
        return self.out(x + weight @ v)


def setting():
    net = Net(nnx.Rngs(0))
    keys = jax.random.split(jax.random.key(1), 2)
    context = Context(tokens=jax.random.randint(keys[0], (M, S), 0, V), mask=jnp.arange(S) < jnp.array([4, 2])[:, None])
    return net, nnx_model(net, vocab=V), context, jax.random.randint(keys[1], (M, R, T), 0, V)


def test_grouped_pass_and_decoding_equal_the_module_itself():
    net, model, context, tokens = setting()
    params = model.init(jax.random.key(0))
    prefix, offset, last = prefix_of(context)
    attended = jnp.ones_like(tokens, bool)
    inputs = inputs_of(last, tokens, attended)
    logits = model.logits(params, jax.jit(model.hidden)(params, prefix, offset, inputs, attended))
    for i in range(M):
        for j in range(R):
            n = int(context.mask[i].sum())
            row = jnp.concatenate([context.tokens[i, :n], tokens[i, j]])[None]
            expected = net(row, jnp.arange(n + T)[None], jnp.ones((1, n + T), bool))[0, n - 1 : -1]
            np.testing.assert_allclose(logits[i, j], expected, atol=1e-5)

    kept, decode = model.prefill(params, prefix), jax.jit(model.decode)
    for column_of in (None, lambda t: (t + 2) % T):  # the cache in order, and as a ring
        cache = model.empty(M, R, T)
        for t in range(T):
            at = jnp.full((M, R), t) if t % 2 else jnp.asarray(t)
            column = () if column_of is None else (jnp.asarray(column_of(t)),)
            hidden, cache = decode(model.decoder(params), kept, prefix.mask, cache, offset, inputs[..., t], at, *column)
            np.testing.assert_allclose(hidden, logits[:, :, t], atol=1e-5)


def test_parameters_are_a_plain_tree_and_get_gradients():
    net, model, context, tokens = setting()
    params = model.init(jax.random.key(0))
    assert type(params) is dict and "calls" not in params
    prefix, offset, last = prefix_of(context)
    attended = jnp.ones_like(tokens, bool)
    inputs = inputs_of(last, tokens, attended)

    def total(params):
        return jnp.sum(jnp.sin(model.hidden(params, prefix, offset, inputs, attended)))

    gradient = jax.jit(jax.grad(total))(params)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert float(jnp.abs(gradient["out"]["kernel"]).max()) > 0
    moved = jax.tree.map(lambda x: 0 * x, params)
    assert float(jnp.abs(model.hidden(moved, prefix, offset, inputs, attended)).max()) == 0
    assert float(jnp.abs(net.out.kernel[...]).max()) > 0, "the module was written to"


def test_the_sampler_takes_it():
    _, model, context, _ = setting()
    keys = jax.random.split(jax.random.key(2), (M, R))
    context = jax.tree.map(lambda x: x[:, None], context)
    run = functools.partial(sample, model, length=T, eos=(1,))
    params = model.init(jax.random.key(0))
    samples = jax.jit(run)(params, keys, context, Sampling())
    prefix, offset, last = prefix_of(jax.tree.map(lambda x: x[:, 0], context))
    hidden = model.hidden(params, prefix, offset, inputs_of(last, samples.tokens, samples.mask), samples.mask)
    logp = jnp.take_along_axis(jax.nn.log_softmax(hidden), samples.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(samples.logp, jnp.where(samples.mask, logp, 0), atol=1e-5)
    refilled = jax.jit(functools.partial(run, slots=2))(params, keys, context, Sampling())
    np.testing.assert_array_equal(refilled.tokens, samples.tokens)
