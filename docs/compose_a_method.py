# %% [markdown]
# # Compose a method
#
# A method is a value: eight slots, each with a pure function. This guide takes one that exists, replaces a slot, runs
# both over several seeds in one program, writes down an equation of its own and tests it, and shows what the library
# says to compositions that cannot work.
#
# Cells begin with `# %%`: VS Code and Jupyter (with Jupytext) open this file as a notebook, and `python
# docs/compose_a_method.py` runs it from top to bottom, in about a minute. `GUIDE_QUICK=1` takes fewer steps.

# %%
import importlib.util
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm import algorithms, tasks
from jaxrl_llm.advantages.group import per_group
from jaxrl_llm.algorithm import changes, describe
from jaxrl_llm.engine import learner
from jaxrl_llm.losses.ratio import log_ratio
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import language_model
from jaxrl_llm.progress import sparkline
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.run import run
from jaxrl_llm.testing import evaluate, random_batch
from jaxrl_llm.types import masked
from jaxrl_llm.updates.optimizer import adamw

QUICK = bool(os.environ.get("GUIDE_QUICK"))
# A few dozen steps of a tiny model: compiling well would take longer than it saves. Leave this out for runs that count.
SOON = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

# %% [markdown]
# ## A task and a policy
#
# Two or three letters to write down in order, in the opposite order, or as they are. The policy is a transformer of one
# layer that imitates the task's demonstrations for a while (`sft` is a recipe as all others), so that it is right now
# and then: what is never right has nothing to learn from.

# %%
task = tasks.load("sorting", shortest=2, longest=3, symbols="abcdef")
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, head_dim=8)
heads = dict(num_attention_heads=4, num_key_value_heads=2)
policy = language_model(transformer(TransformerConfig(vocab_size=len(task.tokenizer), **sizes, **heads)))

imitation = learner(algorithms.load("sft"), policy=policy, task=task, optimizer=adamw(1e-2), prompts_per_step=32)
steps = 20 if QUICK else 120
imitate = jax.jit(lambda key: run(imitation, key, steps, scan=steps)[0].params["policy"], compiler_options=SOON)
start = imitate(jax.random.key(0))

# %% [markdown]
# ## Start from `grpo`, replace a slot
#
# A recipe prints as the expression it is. `jaxrl-llm catalogue` lists all there are.

# %%
grpo = algorithms.load("grpo", group_size=8, kl=None)
print(describe(grpo))

# %% [markdown]
# The advantage of `grpo` is relative to the mean of the group. Ours is relative to the best answer of the group:
# written for one group, as `vmap` (here `per_group`) makes the batch. Rows that do not count must not change anything,
# hence the mask. The number `floor` is bound, not closed over: it becomes an argument of the compiled program.


# %%
def below_the_best(reward: jax.Array, keep: jax.Array, *, floor: float | jax.Array) -> jax.Array:
    """`R_i - max(R)`, and `floor` for the best: `[G]`, 0 where all are equal."""
    best = jnp.max(reward, where=keep, initial=-jnp.inf)
    worst = jnp.min(reward, where=keep, initial=jnp.inf)
    credit = jnp.where(reward == best, floor, reward - best)
    return masked(keep & (best > worst), credit)


print(below_the_best(jnp.array([1.0, 0.0, 0.0, jnp.nan]), jnp.array([True, True, True, False]), floor=0.5))

best_first = replace(grpo, advantage=partial(per_group, partial(below_the_best, floor=0.5)))
print(changes(best_first, grpo))

# %% [markdown]
# ## Run both, over seeds
#
# `learner` gives two pure functions, so a whole run is one program, and vmapped over keys, or over a number of the
# recipe.

# %%
seeds = jax.random.split(jax.random.key(1), 2 if QUICK else 4)
steps = 4 if QUICK else 40


def rewards(algorithm):
    """Mean reward, `[seeds, steps]`."""
    parts = learner(algorithm, policy=policy, task=task, params=start, optimizer=adamw(2e-3), prompts_per_step=16)
    runs = jax.vmap(lambda key: run(parts, key, steps, scan=steps)[1]["reward/mean"])
    return jax.jit(runs, compiler_options=SOON)(seeds)


curves = {"grpo": rewards(grpo), "below the best": rewards(best_first)}
for name, curve in curves.items():
    mean, deviation = curve[:, -5:].mean(), curve[:, -5:].mean(-1).std()
    print(f"{name:15} {sparkline(curve.mean(0).tolist())} {mean:.2f} +- {deviation:.2f} at the end")

# %%
if importlib.util.find_spec("matplotlib"):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(curve.mean(0), label=name)
        axes.fill_between(range(steps), curve.min(0), curve.max(0), alpha=0.2)
    axes.set(xlabel="step", ylabel=f"mean reward ({len(seeds)} seeds)")
    axes.legend()
    Path("runs").mkdir(exist_ok=True)
    figure.savefig("runs/compose_a_method.png")

# %% [markdown]
# ## An equation from a paper
#
# `gspo` has one importance ratio a response, the geometric mean of its tokens' ratios. Say that a paper wants a power
# mean instead, `(mean r_t^p)^(1/p)`: the arithmetic mean at `p = 1`, the geometric one as `p` tends to 0. First the
# equation, for one response; `expm1` and `log1p` keep it exact where `p` is small.


# %%
def power_mean(difference: jax.Array, mask: jax.Array, *, power: float | jax.Array) -> jax.Array:
    """`log (mean_t r_t^p)^(1/p)` of one row, `[]`, from its log-ratios `[T]`."""
    moments = masked(mask, jnp.expm1(power * masked(mask, difference)))
    return jnp.log1p(moments.sum() / jnp.maximum(mask.sum(), 1)) / power


def power_mean_ratio(scores, batch, *, power):
    """The power mean of a row at every token of it, `[B G T]`."""
    difference = log_ratio(scores, batch)
    row = partial(power_mean, power=power)
    return jnp.broadcast_to(jnp.exp(jax.vmap(jax.vmap(row))(difference, batch.mask))[..., None], difference.shape)


def by_power_mean(*, power: float = 0.5, clip: float = 0.2):
    """The recipe: `gspo` with another mean."""
    parent = algorithms.load("gspo", clip_low=clip, clip_high=clip)
    return replace(parent, loss=replace(parent.loss, ratio=partial(power_mean_ratio, power=power)))


print(changes(by_power_mean(), algorithms.load("gspo")))

# %% [markdown]
# By hand: log-ratios `log 1` and `log 4` have the mean `((1 + 2) / 2)^2 = 2.25` at `p = 1/2`. What stands in masked
# places does not count. Then the limits, in value and in the gradient by every token's log-prob: at `p` near 0 it is
# `gspo`. `random_batch` has ragged rows, an empty one and one that does not count.

# %%
row = power_mean(jnp.log(jnp.array([1.0, 4.0, 99.0])), jnp.array([True, True, False]), power=0.5)
np.testing.assert_allclose(jnp.exp(row), 2.25, rtol=1e-5)

scores, batch = jax.jit(random_batch)(jax.random.key(2))
batch = replace(batch, advantage=jax.random.normal(jax.random.key(3), batch.mask.shape))


def same(child, parent, scores, batch, **tolerance):
    found = (jax.jit(partial(evaluate, algorithm.loss))(scores, batch) for algorithm in (child, parent))
    for a, b in zip(*([value, gradient] for value, gradient, _ in found), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


parent = algorithms.load("gspo", clip_low=0.2, clip_high=0.2)
same(by_power_mean(power=1e-4), parent, scores, batch, rtol=1e-3, atol=1e-4)
try:
    same(by_power_mean(power=1.0), parent, scores, batch, rtol=1e-3, atol=1e-4)
except AssertionError:
    print("at p = 1 it is another method, as it should be")

# Of one token every mean is that token's ratio: `grpo`'s.
np.testing.assert_allclose(power_mean(jnp.array([0.3]), jnp.array([True]), power=0.5), 0.3, rtol=1e-5)

# %% [markdown]
# ## Compositions that cannot work
#
# They fail when they are built, not after an hour of training, and say what to do.


# %%
def says(name, build):
    try:
        build()
    except (TypeError, ValueError) as error:
        print(f"{name}:\n  {type(error).__name__}: {error}\n")
    else:
        raise AssertionError(f"{name} was not refused")


def has_one_number_a_prompt(batch):
    return jnp.zeros(batch.mask.shape[0])


def without_critic(algorithm):
    return learner(algorithm, policy=policy, task=task)


says("a reward stage in the loss slot", lambda: replace(grpo, loss=verified))
says("a surrogate in the loss slot", lambda: replace(grpo, loss=partial(clip_min, low=0.2, high=0.2)))
says("an odd group, where the method forbids it", lambda: algorithms.load("mc_grpo", group_size=7))
says("an argument it does not have", lambda: algorithms.load("grpo", groupsize=8))
says("a method that does not exist", lambda: algorithms.load("gprpo"))
says("a critic's advantages without a critic", lambda: without_critic(algorithms.load("ppo")))
says("an advantage of the wrong shape", lambda: without_critic(replace(grpo, advantage=has_one_number_a_prompt)))

# %% [markdown]
# ## From here
#
# `CONTRIBUTING.md` says how such a recipe becomes a file in `jaxrl_llm/algorithms/`: the template, the limit as a line
# of `tests/laws/test_limits.py`, and the laws, which then hold for it without being told.
