"""Measures: statistics where the vocabulary is at hand, paid for only by recipes that read them."""

from __future__ import annotations

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.adjust import adjust
from jaxrl_llm.algorithm import numbers, with_numbers
from jaxrl_llm.engine import learner
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.models.heads import hidden_states
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import score
from jaxrl_llm.types import POLICY, Context, Prompts, Rollouts, Sampling

B, G, S, T, V, D = 2, 2, 3, 5, 11, 8
MODEL = transformer(
    TransformerConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
    )
)


@functools.cache
def params_of(seed):
    return draw_params(seed)


@jax.jit
def draw_params(seed):
    leaves, tree = jax.tree.flatten(jax.eval_shape(MODEL.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten([0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@jax.jit
def rollouts_of():
    keys = jax.random.split(jax.random.key(3), 2)
    context = Context(tokens=jax.random.randint(keys[0], (B, S), 0, V), mask=jnp.arange(S) < jnp.array([[3], [2]]))
    mask = jnp.arange(T) < jnp.array([[T, 1], [3, 0]])[..., None]
    zeros = jnp.zeros((B, G, T))
    return Rollouts(
        prompts=Prompts(context=context, index=jnp.arange(B), target=()),
        context=jax.tree.map(lambda x: x[:, None], context),
        tokens=jax.random.randint(keys[1], (B, G, T), 0, V),
        mask=mask,
        role=jnp.where(mask, POLICY, 0).astype(jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros((B, G), bool),
        sampling=Sampling(temperature=jnp.full((B, G), 0.7)),
    )


def top(logits, tokens, hidden, *, k=3):
    return jax.lax.top_k(logits, k)[1]


def state(logits, tokens, hidden):
    return hidden


def of_token(logits, tokens, hidden, *, scale):
    return scale * jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]


def distance(logits, tokens, hidden, *, old, reference, power=2.0):
    return jnp.sum(logits * old * jnp.abs(reference) ** power, axis=-1)


MEASURES = {"top": top, "state": state, "of_token": partial(of_token, scale=2.0), "distance": distance}


def scored(params, others, **kw):
    rollouts = rollouts_of()
    seen = {role: (p, hidden_states(MODEL, p, rollouts)) for role, p in others.items()}
    return score(MODEL, params, rollouts, frozenset(MEASURES), measures=MEASURES, others=seen, **kw).extras


@pytest.fixture(scope="module")
def found():
    return jax.jit(scored)(params_of(0), {"old": params_of(1), "reference": params_of(2)})


def test_a_measure_sees_logits_tokens_hidden_states_and_the_roles_it_names(found):
    rollouts = rollouts_of()
    hidden_of, logits_of = jax.jit(partial(hidden_states, MODEL)), jax.jit(MODEL.logits)
    hidden = {i: np.asarray(hidden_of(params_of(i), rollouts)) for i in range(3)}
    logits = {i: np.asarray(logits_of(params_of(i), hidden[i])) for i in range(3)}
    mask, tokens = np.asarray(rollouts.mask), np.asarray(rollouts.tokens)
    want = {
        "top": np.argsort(-logits[0], axis=-1)[..., :3],
        "state": hidden[0],
        "of_token": 2 * np.take_along_axis(logits[0], tokens[..., None], -1)[..., 0],
        "distance": (logits[0] * logits[1] * logits[2] ** 2).sum(-1),
    }
    for name, x in want.items():
        keep = mask.reshape(*mask.shape, *[1] * (x.ndim - 3))
        np.testing.assert_allclose(found[name], np.where(keep, x, 0), rtol=1e-5, atol=1e-5, err_msg=name)
    assert found["top"].shape == (B, G, T, 3) and jnp.issubdtype(found["top"].dtype, jnp.integer)
    assert found["state"].shape == (B, G, T, D)


@pytest.mark.parametrize("tokens_a_chunk", [1, 2])
def test_chunks_change_nothing(found, tokens_a_chunk):
    others = {"old": params_of(1), "reference": params_of(2)}
    logits_bytes = 4 * B * G * V * 3 * tokens_a_chunk
    chunked = jax.jit(partial(scored, logits_bytes=logits_bytes))(params_of(0), others)
    text = str(jax.make_jaxpr(partial(scored, logits_bytes=logits_bytes))(params_of(0), others))
    assert "scan" in text  # or nothing was cut
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), chunked, found)


def test_roles_carry_the_gradient_they_are_handed_with():
    """The engine hands all but "elsewhere" with theirs stopped; chunks lose nothing of it."""

    def total(params, others, **kw):
        return scored(params, others, **kw)["distance"].sum()

    others = {"old": params_of(1), "reference": params_of(2)}
    whole = jax.jit(jax.grad(total, argnums=(0, 1)))(params_of(0), others)
    chunks = jax.jit(jax.grad(partial(total, logits_bytes=4 * B * G * V * 3), argnums=(0, 1)))(params_of(0), others)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), chunks, whole)
    assert any(np.asarray(x).any() for x in jax.tree.leaves(whole[1]["old"]))
    # The policy as its own old one, stopped: the gradient is that of the first factor alone.
    own = jax.grad(lambda p, r: total(p, {"old": jax.lax.stop_gradient(p), "reference": r}))
    stopped = jax.jit(own)(params_of(0), params_of(2))
    fixed = jax.jit(jax.grad(total))(params_of(0), {"old": params_of(0), "reference": params_of(2)})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), stopped, fixed)


def test_a_wrong_role_is_named():
    with pytest.raises(TypeError, match=r"measure 'of_token' has the keyword-only argument 'scale': bind it"):
        dataclasses.replace(algorithms.load("grpo"), measures={"of_token": of_token})


def test_numbers_of_a_measure_are_numbers_of_the_recipe():
    recipe = dataclasses.replace(algorithms.load("grpo"), measures={"of_token": partial(of_token, scale=2.0)})
    assert float(numbers(recipe)["measures.of_token.scale"]) == 2.0
    changed = with_numbers(recipe, {"measures.of_token.scale": 3.0})
    assert changed.measures["of_token"].keywords == {"scale": 3.0}


# --- through the engine ---------------------------------------------------------------------------------------------


class Counted:
    """A measure that counts how often it is traced."""

    def __init__(self):
        self.calls = 0
        self.__name__ = "counted"

    def __call__(self, logits, tokens, hidden, *, scale=1.0):
        self.calls += 1
        return scale * jax.nn.log_softmax(logits).max(-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Read:
    """The likelihood, plus measures of the current, old and reference policies."""

    names: tuple[str, ...] = ()
    old: tuple[str, ...] = ()
    aggregate = staticmethod(token_mean)

    def __call__(self, scores, batch):
        total = scores.logp + sum(scores.extras[name] for name in self.names)
        total = total + sum(batch.old.extras[name] for name in self.old)
        return jnp.sum(batch.share * jnp.where(batch.mask, total, 0)), {}


def gap(logits, tokens, hidden, *, reference, old):
    return (logits - reference).sum(-1) + (logits - old).sum(-1)


def recipe_of(measures, **reads):
    return dataclasses.replace(algorithms.load("reinforce", group_size=2), measures=measures, loss=Read(**reads))


@pytest.fixture(scope="module")
def build(policy, letters):
    return partial(learner, policy=policy, task=letters, prompts_per_step=2)


@pytest.mark.parametrize(
    ("reads", "times"), [({}, 0), ({"names": ("counted",)}, 1), ({"names": ("counted",), "old": ("counted",)}, 2)]
)
def test_a_measure_is_computed_once_and_only_where_it_is_read(build, reads, times):
    counted = Counted()
    parts = build(recipe_of({"counted": partial(counted, scale=2.0)}, **reads))
    state = jax.eval_shape(parts.init, jax.random.key(0))
    before = counted.calls
    jax.make_jaxpr(parts.step)(state)
    assert counted.calls - before == times


def test_a_role_is_kept_only_if_a_measure_that_is_read_asks_for_it(build):
    kept = {}
    for names in ((), ("gap",)):
        parts = build(recipe_of({"gap": gap}, names=names))
        kept[names] = set(jax.eval_shape(parts.init, jax.random.key(0)).params)
    assert kept == {(): {"policy"}, ("gap",): {"policy", "reference"}}


def test_at_the_start_every_role_is_the_policy_and_a_number_can_be_turned(build):
    def first_loss(parts):
        return jax.jit(lambda key: parts.step(parts.init(key))[1]["loss"])(jax.random.key(0))

    plain = first_loss(build(recipe_of({})))
    np.testing.assert_allclose(first_loss(build(recipe_of({"gap": gap}, names=("gap",)))), plain, 1e-5)

    parts = build(recipe_of({"counted": partial(Counted(), scale=0.0)}, names=("counted",)))
    start = jax.jit(parts.init)(jax.random.key(0))
    step = jax.jit(parts.step)
    np.testing.assert_allclose(step(start)[1]["loss"], plain, 1e-5)
    turned = step(adjust(start, numbers={"measures.counted.scale": 5.0}))[1]["loss"]
    assert float(turned) < float(step(start)[1]["loss"]) - 1


def test_a_role_that_changes_with_the_measure_is_refused_where_it_is_not_known(build):
    """The old policy is scored before there is another: a measure with roles is not among its scores."""
    with pytest.raises(KeyError, match="gap"):
        build(recipe_of({"gap": gap}, old=("gap",)))
