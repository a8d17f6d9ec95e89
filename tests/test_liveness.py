"""Which inputs a function reads."""

import jax
import jax.numpy as jnp

from jaxrl_llm.liveness import reads

X = jax.ShapeDtypeStruct((3,), jnp.float32)


def test_an_input_nobody_uses_is_not_read():
    assert reads(lambda a, b: a * 2, X, {"c": X, "d": X}) == (True, {"c": False, "d": False})


def test_an_input_that_only_feeds_a_dropped_result_is_not_read():
    def function(a, b):
        unused = jnp.sin(b) + 1
        del unused
        return a

    assert reads(function, X, X) == (True, False)


def test_it_looks_inside_jit():
    inner = jax.jit(lambda a, b: (a + 1, b + 1))
    assert reads(lambda a, b: inner(a, b)[0], X, X) == (True, False)


def test_loops_count_what_they_are_given():
    def function(a, b):
        return jax.lax.fori_loop(0, 3, lambda _, x: x + a, b)

    assert reads(function, X, X) == (True, True)


def test_under_vmap_and_grad():
    def function(a, b):
        return jax.grad(lambda x: jax.vmap(lambda y, z: y * y + 0 * z.astype(int))(x, b).sum())(a)

    assert reads(function, X, X)[0] is True


def test_gradients_and_constants():
    assert reads(lambda a: jnp.ones(3), X) == (False,)
