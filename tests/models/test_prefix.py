"""A prompt encoded once for its group against once for each response: the same numbers, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.engine import learner
from jaxrl_llm.models.heads import critic
from jaxrl_llm.models.model import inputs_of, prefix_of, separate_prefixes
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import EXTRAS, language_model
from jaxrl_llm.types import PADDING, POLICY, Context, Prompts, Rollouts, Sampling

ROOT = Path(__file__).parents[2]
B, G, S, T, V = 2, 4, 5, 4, 13
PROMPTS = jnp.array([[5, 1], [2, 4]])  # tokens of each prompt's contexts; the prefix of one of them is empty
RESPONSES = jnp.array([[4, 2, 1, 3], [0, 4, 2, 4]])

spec = importlib.util.spec_from_file_location("bench_prefix", ROOT / "scripts" / "bench_prefix.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@functools.cache
def model_and_params():
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, head_dim=4)
    model = transformer(TransformerConfig(vocab_size=V, num_key_value_heads=2, **sizes))
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return model, tree.unflatten([0.4 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def rollouts_of(contexts):
    keys = jax.random.split(jax.random.key(3), 2)
    context = Context(tokens=jax.random.randint(keys[0], (B, 2, S), 0, V), mask=jnp.arange(S) < PROMPTS[..., None])
    attended = jnp.arange(T) < RESPONSES[..., None]
    zeros = jnp.zeros(attended.shape)
    return Rollouts(
        prompts=Prompts(context=jax.tree.map(lambda x: x[:, 0], context), index=jnp.arange(B), target=()),
        context=jax.tree.map(lambda x: x[:, :contexts], context),
        tokens=jax.random.randint(keys[1], attended.shape, 0, V),
        mask=attended.at[0, 0, 1].set(False),  # attended, but not the policy's choice
        role=jnp.where(attended, POLICY, PADDING).astype(jnp.int8),
        logp=zeros,
        entropy=zeros,
        version=zeros.astype(jnp.int32),
        truncated=jnp.zeros(attended.shape[:2], bool),
        sampling=Sampling(temperature=jnp.full((B, G), 0.8)),
    )


def from_teacher(logits, tokens, hidden, *, teacher):
    return jnp.sum(jax.nn.softmax(teacher) * jax.nn.log_softmax(logits), axis=-1) + hidden.mean(-1)


def everything(share, params, rollouts):
    """A scalar of all scores, of the policy and of a critic with its own trunk; and the scores."""
    model, _ = model_and_params()
    policy = language_model(model, share_prefix=share)
    teacher = dataclasses.replace(rollouts, tokens=rollouts.tokens[:, ::-1])
    scores = policy.score(
        params["policy"],
        rollouts,
        frozenset({"logp", "entropy", "value", "teacher", *EXTRAS}),
        heads={"value": lambda hidden: hidden @ jnp.linspace(-1.0, 1.0, 16)},
        measures={"teacher": from_teacher},
        others={"teacher": (params["policy"], policy.hidden(params["policy"], teacher))},
    )
    found = {"logp": scores.logp, "entropy": scores.entropy, "value": scores.value, **scores.extras}
    found["critic"] = critic(model if share else separate_prefixes(model)).value(params["critic"], rollouts)
    return sum(jnp.sum(jnp.sin(x)) for x in found.values()), found


@functools.cache
def evaluated(share, contexts):
    _, params = model_and_params()
    params = {"policy": params, "critic": {"trunk": params, "head": {"kernel": jnp.ones(16), "bias": jnp.ones(())}}}
    run = jax.jit(jax.value_and_grad(functools.partial(everything, share), has_aux=True))
    (_, found), gradient = run(params, rollouts_of(contexts))
    return found, gradient


def assert_near(x, y, tolerance=1e-5):
    """Equal up to a fraction of the largest entry, or of 1."""
    for (path, a), b in zip(jax.tree.leaves_with_path(x), jax.tree.leaves(y), strict=True):
        atol = tolerance * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("contexts", [1, 2])
def test_scores_and_gradients_are_the_same(contexts):
    shared, separate = evaluated(True, contexts), evaluated(False, contexts)
    assert {x.dtype for x in jax.tree.leaves(shared)} == {jnp.dtype(jnp.float32)}
    assert all(float(jnp.abs(x).max()) > 0.01 for x in shared[0].values())
    assert float(optax.tree.norm(shared[1])) > 0.1
    assert_near(separate[0], shared[0])
    assert_near(separate[1], shared[1])


def logits_of(model, params, context, tokens, attended):
    prefix, offset, last = prefix_of(context)
    return model.logits(params, model.hidden(params, prefix, offset, inputs_of(last, tokens, attended), attended))


def test_a_random_linear_functional_has_the_same_gradient():
    model, params = model_and_params()
    rollouts = rollouts_of(1)
    context = jax.tree.map(lambda x: x[:, 0], rollouts.context)
    weight = jax.random.normal(jax.random.key(9), (B, G, T, V))

    def of(model, params):
        logits = logits_of(model, params, context, rollouts.tokens, rollouts.attended)
        return jnp.sum(jnp.where(rollouts.attended[..., None], weight * logits, 0))

    shared, separate = (jax.jit(jax.grad(functools.partial(of, m)))(params) for m in (model, separate_prefixes(model)))
    for a, b in zip(jax.tree.leaves(separate), jax.tree.leaves(shared), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b))


@pytest.mark.parametrize("share", [True, False])
def test_permuted_responses_have_permuted_outputs(share):
    model, params = model_and_params()
    run = jax.jit(functools.partial(logits_of, model if share else separate_prefixes(model)))
    rollouts, order = rollouts_of(1), jnp.array([2, 0, 3, 1])
    context = jax.tree.map(lambda x: x[:, 0], rollouts.context)
    there = rollouts.attended[..., None]
    straight = jnp.where(there, run(params, context, rollouts.tokens, rollouts.attended), 0)
    turned = run(params, context, rollouts.tokens[:, order], rollouts.attended[:, order])
    assert_near(jnp.where(there[:, order], turned, 0), straight[:, order], 2e-6)
    assert float(jnp.abs(straight[:, order] - straight).max()) > 0.1


def test_a_step_of_grpo_is_the_same(tiny, letters):
    # Plain gradient descent: Adam would make a large step of a rounding error where the gradient is zero.
    parts = [
        learner(
            algorithms.load("grpo", group_size=4),
            policy=language_model(tiny, share_prefix=share),
            task=letters,
            optimizer=optax.sgd(1.0),
            prompts_per_step=4,
        )
        for share in (True, False)
    ]
    state = parts[0].init(jax.random.key(0))
    (shared, metrics), (separate, others) = (jax.jit(part.step)(state) for part in parts)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), shared.params["policy"], state.params["policy"])
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert_near(separate.params, shared.params)
    assert_near(others, metrics)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "attention", "position_wise"),
    [
        ((4, 2, 3), 0.703704, 0.555556),
        ((1000, 1000, 8), 0.78125, 0.5625),
        ((8192, 512, 8), 0.224913, 0.176471),
        ((7, 5, 1), 1.0, 1.0),
    ],
)
def test_the_paper_s_ratios(sizes, attention, position_wise):
    assert bench.attention(*sizes) == pytest.approx(attention, abs=1e-6)
    assert bench.position_wise(*sizes) == pytest.approx(position_wise, abs=1e-6)


def test_the_floor_is_the_paper_s_ratios_weighted():
    prefix, response, group = 40, 8, 4
    # Width 256 = 4 heads of 64; keys and values 128 each; 704 between; logits over 512.
    layer = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704) * group * (prefix + response)
    attend = 4 * 256 * group * (prefix + response) ** 2 / 2
    logits = 2 * 256 * 512 * group * response
    parts = layer * bench.position_wise(prefix, response, group) + attend * bench.attention(prefix, response, group)
    expected = (parts + logits) / (layer + attend + logits)
    assert bench.floor(bench.MODEL, prefix, response, group) == pytest.approx(expected, rel=1e-12)
    assert bench.floor(bench.MODEL, prefix, response, 1, masked_pairs=True) == 1


def test_compiled_flops_fall_by_the_formula():
    prefix, response, group = 48, 8, 4
    data = bench.rollouts(bench.MODEL, prefix, response, group)
    model = transformer(bench.MODEL)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def flops(share):
        run = jax.jit(functools.partial(bench.total, language_model(model, share_prefix=share)))
        return run.lower(params, data).compile().cost_analysis()["flops"]

    expected = bench.floor(bench.MODEL, prefix, response, group, masked_pairs=True)
    assert expected < 0.5
    assert flops(True) / flops(False) == pytest.approx(expected, rel=0.03)
