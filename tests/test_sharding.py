"""A transformer on 2 x 2 x 2 devices: where its state is, what devices exchange, and that the numbers are the same."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from recurrent import recurrent

from jaxrl_llm import algorithms, sharding
from jaxrl_llm.engine import learner
from jaxrl_llm.hlo import each_collective
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.types import Context
from jaxrl_llm.updates.optimizer import adamw

P = PartitionSpec
PROMPTS, GROUP, STEPS = 8, 3, 2
OPTIMIZER = adamw(0.1, eps=1e-3)  # where a gradient is 0, the step is not that of its rounding
HUGE = 1000  # times that the sampler's loop is said to run, to know it by


def sized(**options):
    """No size of a weight is a number of prompts or rows, so that the shape of an array says what it is."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return TransformerConfig(hidden_size=16, intermediate_size=40, **heads, **options)


@pytest.fixture(scope="module")
def mesh():
    return sharding.mesh(data=2, fsdp=2, tensor=2)


@pytest.fixture(scope="module")
def build(letters):
    vocab = len(letters.tokenizer) + len(letters.tokenizer) % 2
    config = sized(vocab_size=vocab, num_hidden_layers=2, qkv_bias=True, tie_word_embeddings=False)

    def build(mesh):
        return learner(
            algorithms.load("grpo", group_size=GROUP),
            policy=language_model(transformer(config)),
            task=letters,
            optimizer=OPTIMIZER,
            prompts_per_step=PROMPTS,
            mesh=mesh,
        )

    return build


@pytest.fixture(scope="module")
def alone(build):
    return taken(build(None))


@pytest.fixture(scope="module")
def together(build, mesh):
    return taken(build(mesh))


def taken(parts):
    """First state's shardings and parameters, last state, metrics, the program, and how often it was traced."""
    traced = []

    def counted(state):
        traced.append(1)
        return parts.step(state)

    state = parts.init(jax.random.key(0))
    first = jax.tree.map(lambda x: x.sharding, state)
    program = jax.jit(counted, donate_argnums=0)
    compiled = program.lower(state).compile()
    start, seen = state.params, []
    for _ in range(STEPS):
        state, metrics = program(state)
        seen.append(jax.device_get(metrics))
    return first, start, state, seen, compiled, len(traced)


def named(tree):
    return {
        jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_numbers_are_those_of_one_device(alone, together):
    assert all(a["grad_norm"] > 0.01 for a in alone[3])
    for a, b in zip(alone[3], together[3], strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=2e-3, atol=1e-5, err_msg=name)
    for a, b in zip(jax.tree.leaves(alone[2].params), jax.tree.leaves(together[2].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_state_is_made_where_the_table_says_and_stays_there(together, mesh):
    first, _, state, *_ = together
    assert first == jax.tree.map(lambda x: x.sharding, state) == sharding.of_state(mesh, state)
    assert together[-1] == 1
    specs = {path: x.sharding.spec for path, x in named(state).items() if hasattr(x.sharding, "spec")}
    for role in ("params/policy", "params/reference"):
        assert specs[f"{role}/embed"] == P("tensor", "fsdp") and specs[f"{role}/lm_head"] == P("fsdp", "tensor")
        assert specs[f"{role}/layers/gate_proj/kernel"] == P(None, "fsdp", "tensor")
        assert specs[f"{role}/layers/down_proj/kernel"] == P(None, "tensor", "fsdp")
        assert specs[f"{role}/layers/q_proj/bias"] == P(None, "tensor")
        assert specs[f"{role}/layers/input_norm/scale"] == P()
    moments = [path for path in specs if "/mu/" in path or "/nu/" in path]
    assert len(moments) == 2 * len(jax.tree.leaves(state.params["policy"]))
    for path in moments:
        parameter = path.split("/mu/")[-1].split("/nu/")[-1]
        assert specs[path] == specs[f"params/policy/{parameter}"], path


def test_no_large_array_is_whole_on_a_device(together):
    state = together[2]
    for path, x in named((state.params, state.opt_state)).items():
        if x.ndim >= 2 and "norm" not in path and "bias" not in path:
            assert x.addressable_shards[0].data.nbytes == x.nbytes // 4, path


def test_state_is_donated(together):
    _, start, state, _, compiled, _ = together
    assert all(x.is_deleted() for x in jax.tree.leaves(start))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= held


@pytest.fixture(scope="module")
def exchanged(together):
    return each_collective(together[4].as_text(), trips=HUGE)


def test_weights_are_gathered_one_by_one(together, exchanged):
    weights = [x for path, x in named(together[2].params["policy"]).items() if x.ndim > 1]
    one = max(x.nbytes // (x.shape[0] if x.ndim == 3 else 1) // 2 for x in weights)  # of a layer, still split by tensor
    gathers = [x for x in exchanged if x.kind == "all-gather"]
    assert gathers and max(x.bytes for x in gathers) <= one < sum(x.nbytes for x in weights) / 4


def test_neither_prompts_nor_logits_are_gathered(exchanged):
    rows = {n for n in (PROMPTS, PROMPTS // 2, PROMPTS * GROUP, PROMPTS * GROUP // 2)}
    for one in exchanged:
        if one.kind in ("all-gather", "all-to-all", "collective-permute"):
            assert not any(shape and shape[0] in rows for shape in one.shapes), one
    # The rows of a device are B / 4; what it exchanges of them has at most the width of the model, not the vocabulary.
    wide = PROMPTS // 4 * GROUP * 3 * 64 * 4
    assert max(x.bytes for x in exchanged if x.kind != "all-reduce") < wide


def test_a_token_costs_no_weights(exchanged):
    """In the sampler's loop devices exchange what a layer's two halves add up to, and what chooses a token."""
    inside = [x for x in exchanged if x.times >= HUGE]
    assert sum("o_proj" in x.source or "down_proj" in x.source for x in inside if x.kind == "all-reduce") == 4
    assert all(x.bytes <= 128 * 4 for x in inside if x.kind == "all-gather")


def test_the_cache_is_split_by_rows_and_heads(together, letters):
    """Keys of 24 rows, 2 heads of size 8 and the longest response: a device has 6 rows of them and 1 head."""
    text, rest = together[4].as_text(), f"8,{letters.response_length}]"
    assert f"f32[6,1,{rest}" in text
    assert not any(f"f32[{rows},{heads},{rest}" in text for rows, heads in ((24, 2), (24, 1), (12, 2), (12, 1), (6, 2)))


def test_what_a_gradient_keeps_can_be_split_over_tokens(mesh):
    """Inputs of 3 layers, 2 prompts on a device: half of 8 tokens, a prefix of 3, one more, and 2 responses of 2."""
    config = sized(vocab_size=8, num_hidden_layers=3, remat="full", split_tokens=True)
    model = transformer(config)
    params = model.init(jax.random.key(0))
    prefix = Context(tokens=np.ones((8, 3), np.int32), mask=np.arange(3) < np.array([[3], [1]] * 4))
    inputs = np.arange(32, dtype=np.int32).reshape(8, 2, 2) % 8

    weights = np.random.default_rng(0).normal(size=(*inputs.shape, 16)).astype(np.float32)

    def of(model):
        given = prefix, prefix.mask.sum(-1), inputs, inputs >= 0
        return lambda params: (weights * model.hidden(params, *given)).sum()

    split = sharding.place_state(mesh, params, "params/policy")
    compiled = jax.jit(sharding.on_mesh(mesh, jax.grad(of(sharding.placed(model))))).lower(split).compile()
    text = compiled.as_text()
    assert "f32[3,2,4,16]" in text and not any(f"f32[3,2,{tokens},16]" in text for tokens in (7, 8))
    for got, want in zip(jax.tree.leaves(compiled(split)), jax.tree.leaves(jax.grad(of(model))(params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_rows_that_do_not_divide(letters, mesh):
    """Six prompts on four devices for rows, five slots, an odd vocabulary: less is split, nothing is wrong."""

    def losses(mesh):
        parts = learner(
            algorithms.load("reinforce"),
            policy=language_model(recurrent(len(letters.tokenizer) + 1, width=7), slots=5),
            task=letters,
            optimizer=OPTIMIZER,
            prompts_per_step=6,
            mesh=mesh,
        )
        state, step = parts.init(jax.random.key(0)), jax.jit(parts.step)
        found = []
        for _ in range(2):
            state, metrics = step(state)
            found.append(jax.device_get(metrics))
        return found

    for a, b in zip(losses(None), losses(mesh), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("params/policy/embed", (61, 16), P(None, "fsdp")),  # 61 is odd
        ("params/critic/trunk/layers/up_proj/kernel", (2, 16, 40), P(None, "fsdp", "tensor")),
        ("params/critic/head/kernel", (16,), P()),
        ("params/policy/layers/experts/down_proj", (2, 4, 40, 16), P(None, None, "tensor", "fsdp")),
        ("params/policy/layers/router/kernel", (2, 16, 4), P(None, "fsdp")),
        ("params/policy/layers/q_proj/kernel_lora_a", (2, 16, 4), P(None, "fsdp")),
        ("params/policy/layers/o_proj/kernel_lora_b", (2, 4, 16), P(None, None, "fsdp")),
        ("params/policy/conv/taps", (3, 10, 4), P(None, "fsdp")),  # a model of the user's own
        ("memory/update/0/layers/k_proj/kernel", (2, 16, 16), P(None, "fsdp", "tensor")),
        ("memory/prompt/history", (1000, 10), P()),
        ("memory/prompt/history", (2**18, 10), P(("data", "fsdp"))),
        ("memory/prompt/history", (2**18 + 2, 10), P("data")),  # twice odd
        ("memory/prompt/history", (2**18 + 1, 10), P()),
        ("numbers/loss.surrogate.low", (), P()),
    ],
)
def test_the_table(mesh, path, shape, expected):
    assert sharding.spec(mesh.shape, path, shape, math.prod(shape) * 4) == expected
    if path.startswith("params/policy/"):
        assert sharding.of_weights(mesh)(path.removeprefix("params/policy/"), shape).spec == expected


def test_axes_of_one_device_split_nothing():
    mesh = sharding.data_mesh(8)
    assert sharding.spec(mesh.shape, "params/policy/embed", (64, 16)) == P()
    assert sharding.of_rows(mesh, jnp.zeros((8, 3))).spec == P("data")


def test_meshes():
    assert dict(sharding.mesh(fsdp=-1, tensor=2).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert dict(sharding.mesh(**sharding.parse("tensor=2, data=-1")).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dict(sharding.mesh(2, 2, devices=jax.devices()[:4]).shape) == {"data": 2, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3,fsdp=1,tensor=1 needs 3 devices, got 8"),
        ({"data": 3, "fsdp": -1}, "needs a multiple of 3 devices, got 8"),
        ({"data": -1, "fsdp": -1}, "one of them may be -1"),
        ({"data": 0}, "at least 1"),
        ({"data": -2}, "at least 1"),
    ],
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.mesh(**sizes)


@pytest.mark.parametrize("text", ["data", "data=two", "data=2,data=2", "rows=2", "data=2;fsdp=2", ""])
def test_meshes_that_are_not_written_so(text):
    with pytest.raises(ValueError, match="a mesh is written as data=2"):
        sharding.parse(text)
