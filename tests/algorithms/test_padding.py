"""Padding is invisible, for every recipe; and what a loss must not depend on."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import PolicyLoss
from jaxrl_llm.algorithms import names, recipe
from jaxrl_llm.testing import evaluate, fill_slots, prepare, random_batch, whole_step, with_fresh_loss
from jaxrl_llm.types import Scores
from jaxrl_llm.updates.passes import select

# Arguments for groups of four rows of five tokens, where the defaults are not.
SMALL = {"passk": {"k": 2}}
# Some rows of a group are unlike others by their place in it (or in the batch): they do not commute.
PLACED = {"hbpo", "riskpo"}


def load(name, **kwargs):
    return algorithms.load(name, **(SMALL.get(name, {}) | kwargs))


def run(algorithm, scores, batch):
    algorithm = with_fresh_loss(algorithm, batch)
    batch = fill_slots(algorithm, batch)
    shared = whole_step(algorithm.loss, scores, batch)
    measured = {k: x for k, x in scores.extras.items() if jnp.issubdtype(x.dtype, jnp.floating)}

    def loss(logp, value, measured):
        extras = scores.extras | measured
        return algorithm.loss(dataclasses.replace(scores, logp=logp, value=value, extras=extras), shared)

    (value, metrics), gradient = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(scores.logp, scores.value, measured)
    return {
        "value": value,
        "coefficient": gradient[0] * batch.mask.sum(),
        "value_gradient": gradient[1],
        "measured": gradient[2],
        "metrics": {k: jnp.where(batch.mask if jnp.ndim(x) == 3 else True, x, 0) for k, x in metrics.items()},
        "advantage": batch.advantage,
        "keep": batch.keep,
        "reward": batch.reward,
    }


@functools.lru_cache(maxsize=8)
def program(name, **kwargs):
    algorithm = load(name, **kwargs)
    return jax.jit(lambda scores, batch: run(algorithm, scores, batch))


def compiled(name, **kwargs):
    """`run` of a recipe as one program, which most tests of it share; what it finds as arrays of numpy."""
    return lambda scores, batch: jax.tree.map(np.asarray, program(name, **kwargs)(scores, batch))


@functools.lru_cache(maxsize=8)
def batches(measuring, **shape):
    """`random_batch` as one program, which recipes without measures share."""
    measures = load(measuring).measures if measuring else None
    return jax.jit(lambda seed, fill: random_batch(jax.random.key(seed), fill=fill, measures=measures, **shape))


@functools.lru_cache(maxsize=8)
def batch_of(name, seed, *, fill=0.0, **shape):
    return batches(name if load(name).measures else None, **shape)(seed, fill)


@pytest.mark.parametrize("fill", [np.nan, 1e10], ids=["nan", "1e10"])
@pytest.mark.parametrize("name", names(), scope="module")
def test_poison_in_masked_slots_changes_no_bit(name, fill):
    clean, poisoned = compiled(name)(*batch_of(name, 3)), compiled(name)(*batch_of(name, 3, fill=fill))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(clean))
    assert any((x != 0).any() for x in jax.tree.leaves((clean["coefficient"], clean["measured"])))


@pytest.mark.parametrize("name", names(), scope="module")
def test_nothing_to_learn_from_is_zero_not_nan(name):
    scores, batch = batch_of(name, 0)
    got = compiled(name)(scores, dataclasses.replace(batch, keep=np.zeros(batch.keep.shape, bool)))
    assert got["value"] == 0 and not got["coefficient"].any()
    assert not any(x.any() for x in jax.tree.leaves(got["measured"]))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


@functools.lru_cache(maxsize=8)
def in_parts(name):
    """The loss of all prompts, of each half of them, and with its terms left out where nothing has an advantage."""
    algorithm = load(name)

    @jax.jit
    def both(scores, batch):
        fresh = with_fresh_loss(algorithm, batch)
        batch = prepare(fresh, batch)
        shared = whole_step(fresh.loss, scores, batch)
        halves = jax.lax.map(lambda rows: fresh.loss(*select((scores, shared), rows)), jnp.array([[0, 1], [2, 3]]))
        return fresh.loss(scores, shared), halves, without_advantage(algorithm.loss, scores, batch)

    return lambda *arguments: jax.tree.map(np.asarray, both(*arguments))


def without_advantage(loss, scores, batch):
    if not isinstance(loss, PolicyLoss):
        return None
    without = dataclasses.replace(batch, advantage=jnp.zeros(batch.mask.shape))
    return evaluate(dataclasses.replace(loss, terms=()), scores, without)


@pytest.mark.parametrize("name", names(), scope="module")
def test_sum_over_prompts_is_the_whole(name):
    """Micro-batches add up, with shares of the whole step and what was prepared on it."""
    (value, metrics), (values, parts), _ = in_parts(name)(*batch_of(name, 1, prompts=4))
    scalars = {key: x for key, x in metrics.items() if x.ndim == 0}
    sums = values.sum(), {key: parts[key].sum() for key in scalars}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), sums, (value, scalars))


CREDITED = [n for n in names() if isinstance(load(n).loss, PolicyLoss)]


@pytest.mark.parametrize("name", CREDITED, scope="module")
def test_no_advantage_no_gradient(name):
    *_, got = in_parts(name)(*batch_of(name, 2, prompts=4))
    assert got.value == 0 and not got.coefficient.any()


@pytest.mark.parametrize(
    "name", ["grpo", "dr_grpo", "rloo", "dapo", "gspo", "gspo_token", "cispo", "reinforce_pp_baseline"]
)
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 1e6])
def test_equal_rewards_give_exactly_no_gradient(name, reward):
    """Rewards whose mean rounds: the deviations must still be 0, not an ulp divided by an epsilon."""
    kwargs = {} if name in ("dapo", "gspo", "gspo_token", "cispo", "dr_grpo") else {"kl": None}
    scores, batch = batch_of(name, 2, size=7)
    outcome = np.full_like(batch.outcome, reward)
    got = compiled(name, **kwargs)(scores, dataclasses.replace(batch, outcome=outcome))
    # DAPO's length punishment is a reward too; its filter drops these groups.
    assert not got["coefficient"].any()


@pytest.mark.parametrize("name", [n for n in names() if n not in PLACED], scope="module")
def test_order_of_rows_and_groups_does_not_matter(name):
    scores, batch = batch_of(name, 5)
    groups, rows = [2, 0, 1], [3, 1, 0, 2]
    if name in ("dpo", "mc_grpo"):  # one of several equally good rows is chosen by order: make them differ
        noise = 0.1 * jax.random.uniform(jax.random.key(9), batch.outcome.shape)
        batch = dataclasses.replace(batch, outcome=batch.outcome + noise)

    def shuffled(x):
        x = np.asarray(x)
        if x.ndim >= 2 and x.shape[:2] == batch.outcome.shape:
            return x[groups][:, rows]
        return x[groups] if x.ndim else x

    plain, moved = compiled(name)(scores, batch), compiled(name)(*jax.tree.map(shuffled, (scores, batch)))
    np.testing.assert_allclose(moved["value"], plain["value"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(moved["coefficient"], shuffled(plain["coefficient"]), rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("name", names(), scope="module")
def test_more_padding_changes_nothing(name):
    # Constants that default to the budget, which padding is.
    arguments = inspect.signature(recipe(name)).parameters
    kwargs = {key: n for key, n in {"max_length": 5, "limit": 5, "cache": 2}.items() if key in arguments}
    scores, batch = batch_of(name, 6)

    def longer(x):
        x = np.asarray(x)
        return np.pad(x, ((0, 0), (0, 0), (0, 3), *[(0, 0)] * (x.ndim - 3))) if x.ndim >= 3 else x

    context = batch.rollouts.context
    padded = jax.tree.map(longer, (scores, batch))
    padded = (
        padded[0],
        dataclasses.replace(padded[1], rollouts=dataclasses.replace(padded[1].rollouts, context=context)),
    )
    plain, more = compiled(name, **kwargs)(scores, batch), compiled(name, **kwargs)(*padded)
    np.testing.assert_allclose(more["value"], plain["value"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(more["coefficient"][..., :5], plain["coefficient"], rtol=2e-4, atol=1e-5)
    assert not more["coefficient"][..., 5:].any()


@pytest.mark.parametrize("name", names(), scope="module")
@pytest.mark.parametrize("scale", [1e30])
def test_extreme_rewards_are_finite(name, scale):
    scores, batch = batch_of(name, 7)
    got = compiled(name)(scores, dataclasses.replace(batch, outcome=np.asarray(batch.outcome) * np.float32(scale)))
    assert np.isfinite(got["coefficient"]).all()


@pytest.mark.parametrize("name", ["bapo", "capo", "dpo", "gspo", "ppo", "riskpo"], scope="module")
def test_jit_is_no_jit(name):
    scores, batch = batch_of(name, 8)
    eager, jitted = run(load(name), scores, batch), compiled(name)(scores, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), eager, jitted)


def test_scores_without_a_value_are_enough_without_a_critic():
    scores, batch = random_batch(jax.random.key(8))
    assert jnp.isfinite(run(load("grpo"), Scores(logp=scores.logp), batch)["value"])
