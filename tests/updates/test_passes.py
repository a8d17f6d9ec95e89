"""How often a batch is learnt from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.testing import random_batch
from jaxrl_llm.updates.passes import one_pass, select, several_passes


def learn(seen, batch):
    """Counts how often each prompt was learnt from and how many steps there were."""
    index = batch.prompts.index
    steps = seen["steps"] + 1
    return {"times": seen["times"].at[index].add(1), "steps": steps}, {
        "loss": steps * 1.0,
        "ratio/max": steps,
        "ratio/min": steps,
        "gap/max": steps,
    }


def start():
    return {"times": jnp.zeros(4, jnp.int32), "steps": jnp.zeros((), jnp.int32)}


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (1, 4), (3, 2)])
def test_every_prompt_once_an_epoch(epochs, minibatches):
    _, batch = random_batch(jax.random.key(0), prompts=4)
    seen, metrics = several_passes(jax.random.key(1), start(), batch, learn, epochs=epochs, minibatches=minibatches)
    np.testing.assert_array_equal(seen["times"], epochs)
    steps = epochs * minibatches
    assert seen["steps"] == steps
    np.testing.assert_allclose(metrics["loss"], (steps + 1) / 2)
    assert metrics["ratio/max"] == steps and metrics["ratio/min"] == 1
    assert metrics["gap/max"] == 1  # of the first step, the only one of the policy that sampled


def test_one_pass():
    _, batch = random_batch(jax.random.key(0), prompts=4)
    assert one_pass(jax.random.key(1), start(), batch, learn)[0]["steps"] == 1


def test_epochs_are_in_different_orders():
    _, batch = random_batch(jax.random.key(0), prompts=4)
    orders, _ = several_passes(
        jax.random.key(2),
        jnp.zeros((0,), jnp.int32).sum(),
        batch,
        lambda n, part: (n + 1, {"index/max": part.prompts.index.sum() * 0 + n}),
        epochs=2,
        minibatches=4,
    )
    assert orders == 8
    first, second = (jax.random.permutation(k, 4) for k in jax.random.split(jax.random.key(2), 2))
    assert (first != second).any()


def test_groups_stay_whole():
    _, batch = random_batch(jax.random.key(0), prompts=4)
    part = select(batch, jnp.array([2, 0]))
    np.testing.assert_array_equal(part.rollouts.logp, batch.rollouts.logp[jnp.array([2, 0])])
    assert part.step.shape == ()


def test_prompts_must_divide():
    _, batch = random_batch(jax.random.key(0), prompts=4)
    with pytest.raises(ValueError, match="4 prompts do not divide into 3 minibatches"):
        several_passes(jax.random.key(1), start(), batch, learn, minibatches=3)
