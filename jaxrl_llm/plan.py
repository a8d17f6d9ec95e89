"""Pods without a pod: compiles the training step for a TPU slice on any machine, and reads what it will need and take.

The step is that of training (`engine.learner`), compiled from shapes: no weight is ever made. For a TPU this needs
libtpu (the extra `tpu`), not a TPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxrl_llm import algorithms, hlo, sharding
from jaxrl_llm.arguments import arguments
from jaxrl_llm.chips import Topology, topology
from jaxrl_llm.engine import learner
from jaxrl_llm.footprint import Exchange, Memory, Phase, exchanges, on_one, phases, refused, state_memory, used
from jaxrl_llm.hlo_cost import carried, costs
from jaxrl_llm.hlo_program import loops, parse, with_trips
from jaxrl_llm.models import hf, sizes
from jaxrl_llm.models.heads import critic as critic_of
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import Policy, language_model
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Context, Logged, Prompts, TrainState
from jaxrl_llm.updates.optimizer import adamw


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """A training step on a slice."""

    model: str
    """A published size (qwen2.5-0.5b, llama-3-70b ...), a Hugging Face folder or its config.json; no weights needed."""
    topology: str = "v5e:4x4"
    """The slice: v5e:4x4, v6e:8x8, v5p:4x4x4 (chips along each axis), or cpu:8, virtual devices of this machine."""
    mesh: str = "fsdp=-1"
    """How the chips are used: data=2,fsdp=4,tensor=2; one of them may be -1, the rest."""
    algorithm: str = "grpo"
    """Name of a recipe in jaxrl_llm/algorithms."""
    set: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Arguments of the recipe, as --set clip=0.2 kl=none."""
    prompts_per_step: int = 64
    """Prompts per step, of all chips together."""
    group_size: int | None = None
    """Rollouts of a prompt; none: what the recipe says."""
    prompt_length: int = 512
    """Tokens of a prompt."""
    response_length: int = 1024
    """Tokens a response may have."""
    mean_response: float = 1.0
    """Of these, the share that the longest response of a step has: how long sampling takes."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    slots: int | None = None
    """Rows that decode at once; none: all."""
    logits_bytes: int = 2**30
    """Scores compute logits in chunks of about this many bytes, of all chips together."""
    remat: str = "dots_with_no_batch_dims_saveable"
    """What a gradient keeps: full (only each layer's input), none (all), or a name in jax.checkpoint_policies."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the computation and the cache; parameters and the optimiser are float32."""
    split_tokens: bool = False
    """What a gradient keeps between layers is split over `tensor` by tokens: less memory, more exchanged."""
    attention: Literal["xla", "splash"] = "xla"
    """Of whole sequences: splash is a TPU's kernel that never holds an array of queries by keys."""
    scan_decode: bool = True
    """Sampling loops over layers inside the program; otherwise every layer is compiled, for each size of the cache."""
    layers: int | None = None
    """Compile only this many of the model's layers (faster; the figures are those of the smaller model)."""
    compile: bool = True
    """Otherwise, in seconds: only what the policy, its optimiser, a gradient and sampling are certain to take."""
    hlo: Path | None = None
    """File to write the compiled program to."""
    json: bool = False
    """Print all figures as JSON."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the compiler says of a step.

    parameters: of the policy, a count. model_flops: 6 for each parameter and token learned from, and 2 for each token
    sampled or scored once, of all chips; the embedding, if it is not the output too, is left out. once: what the
    compiler's own analysis counts, every loop once.
    """

    config: PlanConfig
    topology: Topology
    mesh: dict[str, int]
    model: TransformerConfig
    group_size: int
    parameters: int
    memory: Memory
    phases: dict[str, Phase] = dataclasses.field(default_factory=dict)
    exchanges: list[Exchange] = dataclasses.field(default_factory=list)
    model_flops: float = 0.0
    once: dict[str, float] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0
    seconds_to_compile: float = 0.0


def plan(config: PlanConfig) -> Plan:
    """Compiles the step and reads it.

    For `cpu:N` this process must have N devices: `jax.config.update("jax_num_cpu_devices", N)` before JAX is used.
    Where libtpu is installed, start with `JAX_PLATFORMS=cpu`, or JAX looks for a TPU. The command line does both.

    Raises:
      ValueError: a name, size or mesh that is none, or sizes that do not divide.
      ImportError: a TPU topology without libtpu.
    """
    _check(config)
    where, model = topology(config.topology), model_of(config)
    recipe = algorithms.recipe(config.algorithm)
    given = config.set if config.group_size is None else {**config.set, "group_size": config.group_size}
    algorithm = algorithms.load(config.algorithm, **arguments(recipe, given, "--set"))
    mesh = sharding.mesh(**sharding.parse(config.mesh), devices=_devices(where))
    begun = time.perf_counter()
    group = int(given.get("group_size", _default(recipe, "group_size", 1)))
    parameters, memory = least(config, model, mesh, where, group)
    empty = Plan(
        config=config,
        topology=where,
        mesh=dict(mesh.shape),
        model=model,
        group_size=group,
        parameters=parameters,
        memory=memory,
    )
    if not config.compile:
        return empty
    state, lowered = _lowered(config, algorithm, model, mesh)
    empty = dataclasses.replace(empty, memory=state_memory(state.params, state.opt_state, state, where))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        memory = refused(empty.memory, str(error))
        return dataclasses.replace(empty, memory=memory, seconds_to_compile=time.perf_counter() - begun)
    text = compiled.as_text()
    if config.hlo is not None:
        config.hlo.write_text(text)
    return dataclasses.replace(_read(empty, text, compiled), seconds_to_compile=time.perf_counter() - begun)


def least(config: PlanConfig, model: TransformerConfig, mesh: Mesh, where: Topology, group: int) -> tuple[int, Memory]:
    """The policy's parameters, a count, and the memory that is certain to be needed, from shapes alone.

    The policy and its optimiser stay; with them is either a gradient or what sampling holds: weights split by `tensor`
    alone, and the caches of prompts and responses.
    """
    net = transformer(model)
    params = jax.eval_shape(net.init, jax.random.key(0))
    place = functools.partial(sharding.of_state, mesh)
    state = _at({"params": params, "opt_state": jax.eval_shape(adamw(1e-6).init, params)}, place)
    found = state_memory(state["params"], state["opt_state"], (), where)

    def weight(path: Any, x: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, sharding.decoder_spec(mesh.shape, name, x.shape))

    def cached(x: Any) -> NamedSharding:
        return NamedSharding(mesh, sharding.fitted(mesh.shape, sharding.cache_axes(x), x.shape))

    contexts, rows = config.prompts_per_step, group
    if config.slots and config.slots < contexts * rows:
        contexts, rows = config.slots, 1
    shape = contexts, config.prompt_length - 1
    prompts = jax.eval_shape(lambda: Context(tokens=jnp.zeros(shape, jnp.int32), mask=jnp.zeros(shape, bool)))
    decoder, prefix = jax.eval_shape(net.decoder, params), jax.eval_shape(net.prefill, params, prompts)
    cache = jax.eval_shape(lambda: net.empty(contexts, rows, config.response_length))
    reads = on_one(_at(decoder, functools.partial(jax.tree_util.tree_map_with_path, weight)))
    reads += on_one(_at(prefix, functools.partial(jax.tree.map, cached)))
    changed = on_one(_at(cache, functools.partial(jax.tree.map, cached)))
    temporary = max(found.parameters, reads + changed)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return count, found._replace(temporary=temporary, cache=changed, reads=reads, total=found.total + temporary)


def model_of(config: PlanConfig) -> TransformerConfig:
    """The model's configuration, by name or from its file.

    Raises:
      ValueError: no such model, or one this transformer does not compute. FileNotFoundError: no such file.
    """
    path, dtype = Path(config.model), jnp.dtype(config.dtype)
    if config.model.lower() in sizes.MODELS:
        found = sizes.config(config.model, dtype=dtype)
    elif path.suffix == ".json":
        found = hf.config(path, dtype=dtype)
    elif path.exists() or len(path.parts) > 1:
        found = hf.read_config(path, dtype=dtype)
    else:
        raise ValueError(
            f"--model: {config.model!r} is neither a folder nor a config.json nor one of {', '.join(sizes.MODELS)}"
        )
    remat = None if config.remat == "none" else config.remat
    found = dataclasses.replace(found, remat=remat, split_tokens=config.split_tokens)
    found = dataclasses.replace(found, scan_decode=config.scan_decode, attention=config.attention)
    return found if config.layers is None else found.first_layers(config.layers)


# --- the program ------------------------------------------------------------------------------------------------------


def _devices(where: Topology) -> list[Any]:
    if where.chip is None:
        found = jax.devices("cpu")
        if len(found) < where.devices:
            raise ValueError(
                f"--topology {where.name}: this process has {len(found)} CPU devices; call "
                f"jax.config.update('jax_num_cpu_devices', {where.devices}) before anything else of JAX"
            )
        return found[: where.devices]
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"--topology {where.name} is compiled by libtpu, which is not installed; in an environment of its own "
            "(it would look for a TPU whenever JAX starts): pip install 'jaxrl_llm[tpu]'"
        )
    # What libtpu asks of the machine it is on, and no machine has: the kind is named again below.
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=where.name).devices)
    except Exception as error:  # of several kinds, by version
        raise ValueError(f"--topology {where.name}: libtpu knows no such slice: {error}") from error


_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def _lowered(config: PlanConfig, algorithm: Any, model: TransformerConfig, mesh: Mesh) -> tuple[TrainState, Any]:
    """The state as shapes in their shardings, and the step traced on it."""
    net = transformer(model)
    parts = learner(
        algorithm,
        policy=_named(language_model(net, slots=config.slots, logits_bytes=config.logits_bytes)),
        task=_task(config, model.vocab_size),
        critic=critic_of(net),
        optimizer=_named_updates(adamw(1e-6)),
        critic_optimizer=_named_updates(adamw(1e-5)),
        prompts_per_step=config.prompts_per_step,
        accumulate=config.accumulate,
        mesh=mesh,
    )
    state = _at(jax.eval_shape(parts.init, jax.random.key(0)), functools.partial(sharding.of_state, mesh))
    prompts = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, _prompts(config, config.prompts_per_step)))
    prompts = _at(prompts, functools.partial(sharding.of_rows, mesh))
    return state, jax.jit(parts.step, donate_argnums=0).trace(state, prompts).lower()


def _at(tree: Any, where: Callable[[Any], Any]) -> Any:
    """Shapes with their shardings."""

    def at(x: Any, s: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)

    return jax.tree.map(at, tree, where(tree))


def _task(config: PlanConfig, vocab: int) -> Task:
    """Prompts and answers of no meaning: what a step costs does not depend on them."""

    def nobody(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("a plan is compiled, never run")

    return Task(
        name="plan",
        tokenizer=SimpleNamespace(eos_token_id=vocab - 1, pad_token_id=0),
        rows=8192,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
        test=nobody,
        grade=nobody,
        columns=nobody,
        batches=lambda seed, n, start=0: iter([_prompts(config, n)]),
        verify=lambda prompts, tokens, mask: (tokens[..., 0] == prompts.target[:, None]).astype(jnp.float32),
        demonstrate=lambda key, prompts: _logged(config, prompts),
    )


def _prompts(config: PlanConfig, n: int) -> Prompts:
    shape = n, config.prompt_length
    arrays: Any = np.zeros(shape, np.int32), np.ones(shape, bool), np.zeros(n, np.int32)
    tokens, mask, zero = arrays
    return Prompts(context=Context(tokens=tokens, mask=mask), index=zero, target=zero)


def _logged(config: PlanConfig, prompts: Prompts) -> Logged:
    tokens = jnp.broadcast_to(prompts.target[:, None, None], (*prompts.target.shape, 2, config.response_length))
    return Logged(tokens=tokens, mask=tokens >= 0, reward=jnp.ones(tokens.shape[:2]))


def _named(policy: Policy) -> Policy:
    """The policy with the names of `PHASES` on what it computes."""
    return dataclasses.replace(
        policy,
        sample=_scope("generation", policy.sample),
        score=_scope("scoring", policy.score),
        hidden=_scope("scoring", policy.hidden),
    )


def _named_updates(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.GradientTransformation(optimizer.init, _scope("optimizer", optimizer.update))


def _scope(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        with jax.named_scope(name):
            return function(*args, **kwargs)

    return named


def _read(empty: Plan, text: str, compiled: Any) -> Plan:
    """With the figures of the compiled program in it."""
    config, where = empty.config, empty.topology
    # With slots, one loop goes on until the last row ended; rows follow each other in a slot.
    rows = config.prompts_per_step * empty.group_size
    unbounded = -(-rows // config.slots) * config.response_length if config.slots and config.slots < rows else 1
    program, whole = parse(text, unbounded), with_trips(text, config.mean_response, unbounded)
    own = compiled.cost_analysis() or {}
    return dataclasses.replace(
        empty,
        memory=used(empty.memory, compiled.memory_analysis(), carried(program)),
        phases=phases(costs(program, config.mean_response), where),
        exchanges=exchanges(hlo.each_collective(whole), where),
        model_flops=_model_flops(empty),
        once={name: float(own.get(name, 0.0)) for name in ("flops", "bytes accessed")},
        unknown_loops=sum(not loop.known and loop.trips == 1 for loop in loops(program)),
    )


def _model_flops(found: Plan) -> float:
    c, config = found.model, found.config
    table = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    tokens = config.prompt_length + found.group_size * config.response_length
    sampled = config.prompt_length + found.group_size * config.response_length * config.mean_response
    return config.prompts_per_step * (found.parameters - table) * (6.0 * tokens + 2.0 * sampled)


# --- what a user can get wrong ----------------------------------------------------------------------------------------


def _check(config: PlanConfig) -> None:
    for name in ("prompts_per_step", "group_size", "prompt_length", "response_length", "accumulate", "slots", "layers"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 < config.mean_response <= 1:
        raise ValueError(f"--mean-response is a share, above 0 and at most 1, got {config.mean_response}")
    if config.prompts_per_step % config.accumulate:
        raise ValueError(f"--accumulate {config.accumulate} must divide --prompts-per-step {config.prompts_per_step}")
    if config.split_tokens:
        sharding.check_split_tokens(config.mesh)


def _default(function: Callable[..., Any], name: str, otherwise: Any) -> Any:
    parameter = inspect.signature(function).parameters.get(name)
    return otherwise if parameter is None or parameter.default is parameter.empty else parameter.default
