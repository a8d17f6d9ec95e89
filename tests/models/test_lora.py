"""Adapters: nothing at first, `W + alpha / r A B` afterwards, and the only thing that is trained, copied or renewed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip("qwix", reason="needs the extra lora")

from jaxrl_llm import algorithms, checkpoint, sharding
from jaxrl_llm.engine import learner
from jaxrl_llm.models.heads import critic
from jaxrl_llm.models.lora import lora
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.types import Context, Rollouts, Sampling

RANK, ALPHA = 2, 6.0
CONFIG = TransformerConfig(
    vocab_size=101,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    qkv_bias=True,
)
LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
TEXT = (
    Context(tokens=jnp.array([[3, 4, 5], [6, 7, 0]]), mask=jnp.array([[True, True, True], [True, True, False]])),
    jnp.array([3, 2]),
    jax.random.randint(jax.random.key(5), (2, 3, 4), 0, CONFIG.vocab_size),
    jnp.ones((2, 3, 4), bool),
)


@pytest.fixture(scope="module")
def base():
    model = transformer(CONFIG)
    params = model.init(jax.random.key(1))
    # Embeddings and kernels of a trained network are not as small as those of a new one.
    return model, jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, params)


@pytest.fixture(scope="module")
def adapted(base):
    return lora(base[0], rank=RANK, alpha=ALPHA)


def some(tree, key=7):
    """Adapters that do change something."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return jax.tree.unflatten(
        structure, [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


@pytest.fixture(scope="module")
def trained(base, adapted):
    """Adapters that change the logits, on the base."""
    return some(adapted.adapter.fresh(jax.random.key(0)))


def logits_of(model):
    return jax.jit(lambda params: model.logits(params, model.hidden(params, *TEXT)))


@pytest.fixture(scope="module")
def plain_logits(base):
    return logits_of(base[0])


@pytest.fixture(scope="module")
def adapted_logits(adapted):
    return logits_of(adapted)


# --- the model --------------------------------------------------------------------------------------------------------


def test_new_adapters_change_no_bit(base, adapted, plain_logits, adapted_logits):
    adapters = adapted.adapter.fresh(jax.random.key(0))
    assert {path[-2] for path in flatten_dict(adapters)} == set(LAYERS)
    a = adapters["layers"]["down_proj"]["kernel_lora_a"]
    assert (
        a.shape == (2, 32, RANK)
        and 0.1 < float(jnp.abs(a).max()) <= 1 / 32**0.5
        and float(jnp.abs(a[0] - a[1]).min()) > 0
    )
    found = adapted_logits(adapted.adapter.join(base[1], adapters))
    np.testing.assert_array_equal(found, plain_logits(base[1]))


def test_adapted_is_merged(base, adapted, trained, plain_logits, adapted_logits):
    found = adapted_logits(adapted.adapter.join(base[1], trained))
    merged = adapted.adapter.merge(base[1], trained)
    np.testing.assert_allclose(found, plain_logits(merged), rtol=1e-5, atol=1e-5)
    assert float(jnp.abs(found - plain_logits(base[1])).max()) > 0.1
    pair = trained["layers"]["up_proj"]
    change = ALPHA / RANK * np.einsum("lir,lro->lio", pair["kernel_lora_a"], pair["kernel_lora_b"])
    np.testing.assert_allclose(
        merged["layers"]["up_proj"]["kernel"], base[1]["layers"]["up_proj"]["kernel"] + change, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(merged["embed"], base[1]["embed"])


def test_targets_alone_are_adapted(base):
    model = lora(base[0], rank=3, alpha=1.0, targets=["v_proj", "gate_proj"])
    adapters = model.adapter.fresh(jax.random.key(0))
    assert {path[-2] for path in flatten_dict(adapters)} == {"v_proj", "gate_proj"}


def test_gradients_are_those_of_the_factors(base, adapted, trained):
    """`dA = s dW B^T` and `dB = s A^T dW`, of the gradient `dW` of the merged kernel."""
    weight = jax.random.normal(jax.random.key(2), (2, 3, 4, CONFIG.hidden_size))

    def loss(model, params):
        return jnp.vdot(weight, model.hidden(params, *TEXT))

    join = functools.partial(adapted.adapter.join, base[1])
    found = jax.jit(jax.grad(lambda adapters: loss(adapted, join(adapters))))(trained)
    merged = jax.jit(jax.grad(functools.partial(loss, base[0])))(adapted.adapter.merge(base[1], trained))
    for name in LAYERS:
        slope, factors = merged["layers"][name]["kernel"], trained["layers"][name]
        a, b = factors["kernel_lora_a"], factors["kernel_lora_b"]
        for key, wanted in (("kernel_lora_a", slope @ b.mT), ("kernel_lora_b", a.mT @ slope)):
            got = found["layers"][name][key]
            near = 1e-4 * float(jnp.abs(got).max())
            np.testing.assert_allclose(got, ALPHA / RANK * wanted, rtol=1e-3, atol=near, err_msg=f"{name} {key}")


def test_the_sampler_uses_adapters(base, adapted, trained):
    """Prefill, and every decoded token: log-probs are those of scoring, and of the merged model."""
    policy, plain = language_model(adapted), language_model(base[0])
    params, merged = adapted.adapter.join(base[1], trained), adapted.adapter.merge(base[1], trained)
    keys = jax.random.split(jax.random.key(3), (2, 3))
    context = jax.tree.map(lambda x: x[:, None], TEXT[0])
    draw = [
        jax.jit(functools.partial(p.sample, length=5, sampling=Sampling(temperature=jnp.ones((2, 3)))))
        for p in (policy, plain)
    ]
    samples, same, other = (
        draw[0](params, keys, context),
        draw[1](merged, keys, context),
        draw[1](base[1], keys, context),
    )
    np.testing.assert_array_equal(samples.tokens, same.tokens)
    np.testing.assert_allclose(samples.logp, same.logp, rtol=1e-4, atol=1e-5)
    assert (samples.tokens != other.tokens).any()
    rollouts = rollouts_of(samples, context)
    scored = jax.jit(functools.partial(policy.score, fields=frozenset({"logp"})))(params, rollouts)
    np.testing.assert_allclose(samples.logp, scored.logp, rtol=1e-4, atol=1e-5)


def rollouts_of(samples, context):
    blank = jnp.zeros(samples.tokens.shape)
    return Rollouts(
        prompts=None,
        context=context,
        tokens=samples.tokens,
        mask=samples.mask,
        role=samples.mask.astype(jnp.int8),
        logp=blank,
        entropy=blank,
        version=blank,
        truncated=samples.truncated,
        sampling=Sampling(temperature=jnp.ones(samples.tokens.shape[:2])),
    )


def test_decoding_as_a_scan_over_layers_uses_them_too(base, trained):
    made = [
        lora(transformer(dataclasses.replace(CONFIG, scan_decode=scan)), rank=RANK, quantize="nf4", block_size=8)
        for scan in (False, True)
    ]
    kept = made[0].adapter.base(base[1])

    def two_tokens(model, adapters):
        prefix, offset, inputs, _ = TEXT
        params = model.adapter.join(kept, adapters)
        cache, decoder, found = model.empty(2, 3, 2), model.decoder(params), []
        for t in range(2):
            now = jnp.int32(t)
            filled = model.prefill(params, prefix)
            hidden, cache = model.decode(decoder, filled, prefix.mask, cache, offset, inputs[..., t], now)
            found.append(hidden)
        return jnp.stack(found, 2)

    plain, scanned = (jax.jit(functools.partial(two_tokens, model))(trained) for model in made)
    np.testing.assert_allclose(scanned, plain, rtol=1e-4, atol=1e-4)
    hidden = jax.jit(made[0].hidden)(made[0].adapter.join(kept, trained), *TEXT)[:, :, :2]
    np.testing.assert_allclose(plain, hidden, rtol=1e-4, atol=1e-4)


# --- training ---------------------------------------------------------------------------------------------------------


def small(letters, **changes):
    config = dataclasses.replace(
        CONFIG, vocab_size=len(letters.tokenizer), num_hidden_layers=1, hidden_size=16, qkv_bias=False, **changes
    )
    return transformer(config)


def arrays(tree):
    return jax.tree.map(np.asarray, tree)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_trains_adapters_alone(letters):
    """One trace; optimiser, reference and gradient are of adapters; the base stays, and so does what the user gave."""
    model = lora(small(letters), rank=RANK, alpha=ALPHA)
    policy, params = language_model(model), small(letters).init(jax.random.key(1))
    given, traces = arrays(params), []
    recipe = algorithms.load("grpo", group_size=4, kl=0.1)
    parts = learner(recipe, policy=policy, task=letters, params=params, optimizer=optax.adam(0.05), prompts_per_step=4)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        traces.append(1)
        return parts.step(state)

    state = parts.init(jax.random.key(0))
    assert sorted(state.params) == ["base", "policy", "reference"] and sorted(state.opt_state) == ["policy"]
    same(arrays(state.params["base"]), given)
    shapes = sorted(x.shape for x in jax.tree.leaves(model.adapter.fresh(jax.random.key(0))))
    for tree in (state.params["policy"], state.params["reference"], state.opt_state["policy"][0].mu):
        assert sorted(x.shape for x in jax.tree.leaves(tree)) == shapes
    first = arrays(state.params["policy"])
    history = []
    for _ in range(4):
        state, metrics = step(state)
        history.append({name: float(metrics[name]) for name in ("grad_norm", "loss/kl_to_reference", "gap/max")})
    assert len(traces) == 1
    assert all(line["grad_norm"] > 0 and line["gap/max"] < 1e-4 for line in history), history
    # The reference is the base: no divergence from it before the first step, some after it.
    assert history[0]["loss/kl_to_reference"] == 0.0 < history[-1]["loss/kl_to_reference"]
    same(arrays(state.params["base"]), given)
    same(arrays(state.params["reference"]), first)
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), arrays(state.params["policy"]), first)
    assert min(jax.tree.leaves(moved)) > 0
    same(arrays(params), given)  # not donated
    hidden = [jax.jit(m.hidden) for m in (model, small(letters))]
    same(hidden[0](policy.whole(state.params, "reference"), *TEXT), hidden[1](params, *TEXT))


def test_lagged_roles_and_critics_are_adapters_too(letters, tmp_path):
    """`nlpo` samples within what a lagged copy allows, and has a critic: one base for all of them."""
    plain = small(letters)
    model = lora(plain, rank=RANK, alpha=ALPHA, targets=["q_proj", "down_proj"], quantize="nf4", block_size=16)
    parts = learner(
        algorithms.load("nlpo", group_size=2, mass=0.8, kl=0.1, epochs=1, every=2),
        policy=language_model(model),
        critic=critic(model),
        task=letters,
        params=arrays(plain.init(jax.random.key(1))),
        optimizer=optax.adam(0.05),
        critic_optimizer=optax.adam(0.05),
        prompts_per_step=4,
    )
    state = parts.init(jax.random.key(0))
    assert sorted(state.params) == ["base", "critic", "lagged", "policy", "reference"]
    assert sorted(state.opt_state) == ["critic", "policy"]
    size = sum(x.size for x in jax.tree.leaves(model.adapter.fresh(jax.random.key(0))))
    for tree, more in (("policy", 0), ("lagged", 0), ("reference", 0), ("critic", CONFIG.hidden_size + 1)):
        assert sum(x.size for x in jax.tree.leaves(state.params[tree])) == size + more, tree
    base, before = arrays(state.params["base"]), arrays(state.params)
    step = jax.jit(parts.step)
    state, metrics = step(state)
    same(arrays(state.params["lagged"]), before["lagged"])
    state, metrics = step(state)
    assert np.isfinite(float(metrics["loss"])) and float(metrics["grad_norm"]) > 0
    same(arrays(state.params["base"]), base)
    same(arrays(state.params["lagged"]), arrays(state.params["policy"]))  # renewed
    trunk = arrays(state.params["critic"]["trunk"])
    assert max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), trunk, before["critic"]["trunk"]))) > 0
    # 4-bit codes survive a checkpoint.
    checkpoint.save(tmp_path / "state", state)
    data = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, state)
    read = checkpoint.load(tmp_path / "state", state)
    read = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, read)
    same(arrays(read), arrays(data))


def test_the_same_on_a_mesh(letters):
    """Codes, scales and factors are split where the table says; the step is the same."""
    plain = small(letters)
    model = lora(plain, rank=RANK, alpha=ALPHA, quantize="nf4", block_size=8)
    params = plain.init(jax.random.key(1))
    states = []
    for mesh in (None, sharding.mesh(data=2, fsdp=2, tensor=2)):
        parts = learner(
            algorithms.load("reinforce", group_size=4),
            policy=language_model(model),
            task=letters,
            params=params,
            optimizer=optax.sgd(1.0),
            prompts_per_step=4,
            mesh=mesh,
        )
        state, metrics = jax.jit(parts.step)(parts.init(jax.random.key(0)))
        assert float(metrics["grad_norm"]) > 0
        states.append(state)
    kernel = states[1].params["base"]["layers"]["gate_proj"]["kernel"].array
    assert tuple(kernel.qvalue.sharding.spec) == (None, "fsdp", "tensor"), kernel.qvalue.sharding
    same(arrays(states[0].params["base"]), arrays(states[1].params["base"]))
    for one, other in zip(*(jax.tree.leaves(arrays(s.params["policy"])) for s in states), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


# --- quantisation -----------------------------------------------------------------------------------------------------


# Half of the widest step between two values that can be kept, of the largest of those that share a scale.
@pytest.mark.parametrize(
    ("quantize", "block_size", "step"), [("int8", None, 1 / 255), ("int4", 8, 1 / 15), ("nf4", 8, 0.16)]
)
def test_quantised_kernels_are_near(base, quantize, block_size, step):
    model = lora(base[0], rank=RANK, alpha=ALPHA, quantize=quantize, block_size=block_size)
    kept = model.adapter.base(base[1])
    back = model.adapter.merge(kept, model.adapter.fresh(jax.random.key(0)))
    for name in LAYERS:
        kernel, found = base[1]["layers"][name]["kernel"], back["layers"][name]["kernel"]
        blocks = kernel.reshape(2, -1, block_size or kernel.shape[1], kernel.shape[-1])
        largest = jnp.broadcast_to(jnp.abs(blocks).max(2, keepdims=True), blocks.shape).reshape(kernel.shape)
        error = jnp.abs(found - kernel)
        assert float((error - step * largest).max()) <= 1e-6 and float(error.max()) > 0, name
    same(
        arrays({k: v for k, v in back.items() if k != "layers"}),
        arrays({k: v for k, v in base[1].items() if k != "layers"}),
    )


def test_a_quantised_base_is_read_where_it_is_multiplied(base):
    """Logits are those of the dequantised base; the program is given 4 bits a weight."""
    model = lora(base[0], rank=RANK, alpha=ALPHA, quantize="nf4", block_size=8)
    kept, adapters = model.adapter.base(base[1]), some(model.adapter.fresh(jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves(kept["layers"]) if x.ndim == 3 and x.size > 1000} == {jnp.dtype("int4")}
    run = jax.jit(model.hidden)
    merged = model.adapter.merge(kept, adapters)
    np.testing.assert_allclose(
        run(model.adapter.join(kept, adapters), *TEXT), jax.jit(base[0].hidden)(merged, *TEXT), rtol=1e-4, atol=1e-5
    )
    programs = [jax.jit(lambda x: x).lower(tree["layers"]).compile() for tree in (base[1], kept)]
    sizes = [program.memory_analysis().argument_size_in_bytes for program in programs]
    weights = sum(x.size for x in jax.tree.leaves(base[1]["layers"]) if x.ndim == 3)
    # A scale of 4 bytes for 8 weights.
    assert sizes[1] < sizes[0] - weights * (4 - 0.5 - 0.5) + 4096


def test_a_run_in_bfloat16_on_four_bits(letters):
    plain = small(letters, dtype=jnp.bfloat16)
    model = lora(plain, rank=RANK, alpha=ALPHA, quantize="nf4", block_size=16)
    state = learner(
        algorithms.load("grpo", group_size=4), policy=language_model(model), task=letters, prompts_per_step=4
    ).init(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(state.params["policy"])} == {jnp.dtype("float32")}
    params = language_model(model).whole(state.params)
    out = jax.eval_shape(model.hidden, params, *TEXT)
    assert out.dtype == jnp.bfloat16
    same(arrays(jax.jit(model.hidden)(params, *TEXT)), arrays(jax.jit(lambda p: model.hidden(p, *TEXT))(params)))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be at least 1"),
        ({"rank": 16}, "less than 16"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"targets": ["q_proj", "c_attn"]}, "no target 'c_attn': the model's linear layers are down_proj, gate_proj"),
        ({"targets": []}, "targets must be a list"),
        ({"targets": "q_proj"}, "targets must be a list"),
        ({"quantize": "int3"}, "quantize must be one of int8, int4, nf4"),
        ({"block_size": 8}, "block_size=8 is of a quantised base"),
        ({"quantize": "nf4"}, "block_size 64 must divide the inputs of every linear layer"),
        ({"quantize": "int8", "block_size": 0}, "block_size 0 must divide"),
    ],
)
def test_refuses_what_does_not_fit(base, arguments, message):
    with pytest.raises(ValueError, match=message):
        lora(base[0], **arguments)


def test_refuses_models_it_cannot_change(adapted):
    for model in (adapted, dataclasses.replace(adapted, wrapped=None, adapter=None)):
        with pytest.raises(ValueError, match="Flax Linen"):
            lora(model)


def test_refuses_adapters_of_another_model(base, adapted, letters):
    adapters = adapted.adapter.fresh(jax.random.key(0))
    other = lora(base[0], rank=3)
    with pytest.raises(ValueError, match=r"shape \(2, 32, 2\), this model's is \(2, 32, 3\): check its rank"):
        other.adapter.own(other.adapter.join(base[1], adapters))
    few = lora(base[0], rank=RANK, targets=["q_proj"])
    with pytest.raises(ValueError, match="has adapters for layers/down_proj"):
        few.adapter.own(few.adapter.join(base[1], adapters))
    model = lora(small(letters), rank=RANK)
    recipe = algorithms.load("grpo", group_size=2, kl=0.1)
    parts = learner(
        recipe, policy=language_model(model), task=letters, reference=small(letters).init(jax.random.key(0))
    )
    with pytest.raises(ValueError, match="reference has no adapters"):
        jax.eval_shape(parts.init, jax.random.key(0))
