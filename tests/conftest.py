"""Eight virtual CPU devices for every test, and the smallest policy that has all the parts."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import resource
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test is compilation. The flags are read once, when the backend starts; programs the tests start keep theirs.
FLAGS = os.environ.get("XLA_FLAGS")
FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith("0.10."):  # other versions may not know it, and XLA ends the process then
    FAST += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{FLAGS or ''} {FAST}"

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.devices()
if FLAGS is None:
    del os.environ["XLA_FLAGS"]
else:
    os.environ["XLA_FLAGS"] = FLAGS

import jax.numpy as jnp
import pytest

from jaxrl_llm import run, tasks
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.tasks.characters import character_tokenizer
from jaxrl_llm.types import Context, Logged, Prompts

TOKENIZER = character_tokenizer()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share what they compile, and so do those of one method: each such set runs on one worker."""
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, name = nodeid.partition("::")
            each = file.endswith(("test_laws.py", "test_padding.py"))
            return f"{file}[{name.partition('[')[2].partition('-')[0]}" if each else file

    return Together(config, log)


@pytest.fixture(scope="module", autouse=True)
def programs_are_forgotten():
    """A process may map 65,530 pieces of memory, and a compiled program takes dozens: not all outlive their file."""
    yield
    forget()


@pytest.fixture(scope="session")
def fast_flags():
    """Of programs that compile fast, for processes that a test starts."""
    return FAST


@pytest.fixture(scope="session")
def forget_programs():
    return forget


def forget(most=25_000):
    """Drops all programs if they are many; few are kept, as the small ones are of use to every test."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") < most:
        gc.freeze()  # what is kept is not searched through again and again
        return
    gc.unfreeze()
    run._program.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def fault_runs():
    """`scripts/fault_runs.py`: small runs to break."""
    place = Path(__file__).parents[1] / "scripts" / "fault_runs.py"
    spec = importlib.util.spec_from_file_location("fault_runs", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def no_room():
    """`with no_room(size):` no file may grow beyond `size` bytes; the kernel refuses, as it does on a full disk."""

    @contextlib.contextmanager
    def limited(size=2000):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def task():
    """Sorting two characters: in-graph prompts, verifier and demonstrations."""
    return tasks.load("sorting")


@pytest.fixture(scope="session")
def tiny(task):
    """A transformer of one layer over the task's vocabulary."""
    return transformer(
        TransformerConfig(
            vocab_size=len(task.tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


@pytest.fixture(scope="session")
def policy(tiny):
    return language_model(tiny)


@pytest.fixture(scope="session")
def letters():
    """The easiest task there is: answer with a letter and stop. A fresh policy is right about one time in three."""
    return tasks.task.Task(
        name="letters",
        tokenizer=TOKENIZER,
        rows=16,
        prompt_length=3,
        response_length=3,
        test=lambda n: _prompts(jax.random.key(1), n),
        draw=_prompts,
        verify=_is_letter,
        grade=lambda prompts, completions, **_: [float(c[:1].islower()) for c in completions],
        columns=lambda prompts: {},
        demonstrate=_demonstrate,
    )


def _prompts(key, n):
    index = jax.random.randint(key, (n,), 0, 16)
    digits = TOKENIZER.convert_tokens_to_ids("0") + index[:, None] % 10
    tokens = jnp.concatenate([digits, digits, digits], -1).astype(jnp.int32)
    mask = jnp.arange(3) < 1 + (index % 3)[:, None]
    return Prompts(context=Context(tokens=tokens, mask=mask), index=index, target=index)


def _is_letter(prompts, tokens, mask):
    a, z = TOKENIZER.convert_tokens_to_ids("a"), TOKENIZER.convert_tokens_to_ids("z")
    return ((tokens[..., 0] >= a) & (tokens[..., 0] <= z) & mask[..., 0]).astype(jnp.float32)


def _demonstrate(key, prompts):
    b, eos = prompts.index.shape[0], TOKENIZER.eos_token_id
    rows = [[TOKENIZER.convert_tokens_to_ids(c), eos, 0] for c in "c7"]
    return Logged(
        tokens=jnp.broadcast_to(jnp.array(rows, jnp.int32), (b, 2, 3)),
        mask=jnp.broadcast_to(jnp.array([True, True, False]), (b, 2, 3)),
        reward=jnp.broadcast_to(jnp.array([1.0, 0.0]), (b, 2)),
    )
