"""Ablations: arms over seeds, each arm's learning rate found in the same way, effects with their intervals.

An experiment is a file whose docstring holds the command, the time, the claim and the number the paper reported, and
whose `STUDY` says which arms are compared by what. `main(__doc__, __file__, STUDY)` runs all seeds of an arm as one
compiled program (`vmap` over whole runs), and writes `results/NAME.{json,md,png}`.

    python experiments/NAME.py [--smoke] [--seeds 6] [--out FOLDER]

The protocol, the same for every arm: start from the same half-trained policies (one a seed: supervised on right and
wrong answers in equal parts, so that RL chooses), train with each of the study's learning rates on tuning seeds, take
the best, train on the study's own seeds, evaluate on held-out problems. A comparison is paired by seed; its interval is
the 95 % percentile bootstrap of the mean difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from pages import RESULTS, bootstrap, curves, field, grid, spread, worst, write, write_verdicts

from jaxrl_llm import tasks
from jaxrl_llm.advantages.basic import uniform
from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.engine import learner
from jaxrl_llm.losses.likelihood import NegativeLogLikelihood
from jaxrl_llm.models.heads import value_head
from jaxrl_llm.models.transformer import TransformerConfig, transformer
from jaxrl_llm.policy import Policy, language_model
from jaxrl_llm.rollouts.logged import logged
from jaxrl_llm.run import run
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import PyTree, Sampling, TrainState
from jaxrl_llm.updates.optimizer import adamw

TUNING = 1000  # seeds from here on find learning rates and nothing else
TESTED = 128  # held-out problems
DRAWS = 16  # samples of each
Curves = Mapping[str, np.ndarray]  # [seeds, steps] by metric


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train.

    recipe: the method.
    options: of `learner`.
    steps: of its own, if the paper's point is another budget.
    rates: of its own, if the rate is the paper's point.
    first: a recipe that trains before, and for how many of the steps.
    others: more settings of the method; the best is found on the tuning seeds, as the rate is.
    """

    recipe: Algorithm
    others: tuple[Algorithm, ...] = ()
    first: tuple[Algorithm, int] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    rates: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an arm's seeds gave. Values are `[seeds]`, curves `[seeds, steps]`."""

    rate: float
    values: dict[str, np.ndarray]
    curves: dict[str, np.ndarray]
    seconds: float = 0.0  # of CPU time

    def late(self, metric: str, share: float = 0.1) -> np.ndarray:
        """`[seeds]`: the mean of the last part of a training curve."""
        curve = self.curves[metric]
        return curve[:, -max(1, int(share * curve.shape[1])) :].mean(1)

    def mean(self, metric: str) -> np.ndarray:
        """`[seeds]`: the mean over all of training."""
        return self.curves[metric].mean(1)

    def steps_to(self, target: float) -> np.ndarray:
        """`[seeds]`: steps until the held-out accuracy was first `target`; one evaluation more than all if never."""
        curve, steps = self.curves["held_out"], self.curves["loss"].shape[1]
        evaluations = curve.shape[1]
        reached = curve >= target
        first = np.where(reached.any(1), reached.argmax(1), evaluations)
        return (first + 1) * (steps / evaluations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`arm` against `base` by `value`, a name in `Outcome.values` or a function of the outcome.

    effect: `(outcomes by arm) -> [seeds]` instead, where two arms do not say it.
    sign: +1 if the paper claims more, -1 if less.
    margin: the effect must be beyond it; with the other sign it says "not worse by more than".
    main: whether the study's verdict depends on it.
    of: the method it is about, if the study has several.
    """

    text: str
    arm: str = ""
    base: str = ""
    value: str | Callable[[Outcome], np.ndarray] = "avg@16"
    effect: Callable[[Mapping[str, Outcome]], np.ndarray] | None = None
    margin: float = 0.0
    sign: int = 1
    main: bool = True
    of: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """Arms, how they are trained, and what is compared.

    task: `tasks.load` name and options.
    warm: supervised steps before.
    watch: also evaluates every so many steps: `curves["held_out"]`, avg@16, `[seeds, evaluations]`.
    choose: by what the learning rate is chosen (higher is better), on the tuning seeds.
    columns: values and `late` curves shown in the table.
    picture: the metric that is drawn, step by step.
    extra: more values of an arm, `(arm name, Outcome) -> {name: [seeds]}`.
    """

    arms: Mapping[str, Arm]
    comparisons: tuple[Comparison, ...]
    methods: tuple[str, ...]
    task: tuple[str, Mapping[str, Any]] = ("sorting", {"shortest": 3, "longest": 4, "symbols": "abcd"})
    width: int = 32
    warm: int = 600
    steps: int = 300
    watch: int = 0
    prompts: int = 16
    rates: tuple[float, ...] = (3e-4, 6e-4, 1e-3)  # above, runs of models this small scatter
    choose: str = "avg@16"
    columns: tuple[str, ...] = ("accuracy", "pass@8", "entropy")
    picture: str = "reward/mean"
    extra: Callable[[str, Outcome], Mapping[str, np.ndarray]] | None = None
    draw: Callable[[Any, Mapping[str, Outcome]], None] | None = None


def main(doc: str, file: str, study: Study, arguments: list[str] | None = None) -> dict[str, Any]:
    """Runs a study from the command line and writes its results."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two seeds and steps of two arms: does it run?")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="folder; if not given, the committed results, or none with --smoke")
    args = parser.parse_args(arguments)
    if args.smoke:
        study, args.seeds = in_short(study), 2
    start = time.process_time()
    found = compare(study, seeds=args.seeds)
    result = {
        "experiment": Path(file).stem,
        **{key: field(doc, key) for key in ("Claim", "Reported")},
        "methods": list(study.methods),
        "seeds": args.seeds,
        "cpu_minutes": round((time.process_time() - start) / 60, 1),
        **summary(study, found),
    }
    page = table(study, result)
    if args.out or not args.smoke:
        draw = functools.partial(picture, study=study, found=found)
        write(args.out or RESULTS, result, page, draw, (6.4, 4))
    if not (args.out or args.smoke):
        write_verdicts()
    print(page)
    return result


def in_short(study: Study) -> Study:
    """Two steps of the first two arms, compiled as fast as XLA can."""
    fast = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    if version("jaxlib").startswith("0.10."):  # others may not know it, and XLA ends the process then
        fast += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", fast)
    arms = {name: dataclasses.replace(arm, steps=2, others=()) for name, arm in list(study.arms.items())[:2]}
    compared = (Comparison(text="does it run?", arm=list(arms)[-1], base=next(iter(arms))),)
    few = {"steps": 2, "warm": 2, "watch": min(study.watch, 1), "rates": study.rates[:1], "draw": None}
    return dataclasses.replace(study, arms=arms, comparisons=compared, **few)


# --- training ---------------------------------------------------------------------------------------------------------


def compare(study: Study, *, seeds: int) -> dict[str, Outcome]:
    """Every arm's outcome."""
    kind, options = study.task
    task = tasks.load(kind, **options)
    policy, critic = small_policy(task, study.width)
    start = warm_start(policy, task, study.warm, seeds)
    found = {}
    for name, arm in study.arms.items():
        begun = time.process_time()
        found[name] = of_arm(study, arm, policy, critic, task, start, seeds)
        if study.extra is not None:
            more = {key: np.asarray(x) for key, x in study.extra(name, found[name]).items()}
            found[name] = dataclasses.replace(found[name], values={**found[name].values, **more})
        found[name] = dataclasses.replace(found[name], seconds=time.process_time() - begun)
        shown = [f"{name:24s} rate {found[name].rate:g}"]
        shown += [f"{c} {spread(column(found[name], c))}" for c in study.columns]
        print(*shown, f"{found[name].seconds:.0f} s", sep="  ", file=sys.stderr, flush=True)
        jax.clear_caches()
    return found


def small_policy(task: Task, width: int) -> tuple[Policy, Any]:
    """A transformer of one layer, and a value head on it."""
    model = transformer(
        TransformerConfig(
            vocab_size=len(task.tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=max(8, width // 4),
            remat=None,
        )
    )
    return language_model(model), value_head(width)


def warm_start(policy: Policy, task: Task, steps: int, seeds: int) -> Callable[[Array], PyTree]:
    """`(seed) -> params`: supervised on a right and a wrong answer a problem."""
    half = Algorithm(rollout=functools.partial(logged, take=None), advantage=uniform, loss=NegativeLogLikelihood())
    parts = learner(half, policy=policy, task=task, optimizer=adamw(1e-2), prompts_per_step=32)

    def train(seed: Array) -> PyTree:
        return run(parts, jax.random.key(seed), steps, scan=steps)[0].params["policy"]

    several = jax.jit(jax.vmap(train))
    ours = several(jnp.arange(seeds))
    tuning = several(TUNING + jnp.arange(seeds))
    return lambda seed: jax.tree.map(lambda a, b: jnp.where(seed < TUNING, a[seed], b[seed - TUNING]), ours, tuning)


def of_arm(
    study: Study, arm: Arm, policy: Policy, critic: Any, task: Task, start: Callable[[Array], PyTree], seeds: int
) -> Outcome:
    """Finds the arm's learning rate, and setting, on tuning seeds; then trains on the study's."""
    rates = study.rates if arm.rates is None else arm.rates
    tried = []
    for recipe in (arm.recipe, *arm.others):
        program = jax.jit(jax.vmap(functools.partial(train, study, arm, recipe, policy, critic, task, start)))
        scores = [np.nan] * len(rates)
        if len(rates) * (1 + len(arm.others)) > 1:
            # As many members as in the end: the same program.
            for i, rate in enumerate(rates):
                values, metrics = program(TUNING + jnp.arange(seeds), jnp.full(seeds, rate))
                found = values[study.choose] if study.choose in values else metrics[study.choose][:, -10:].mean(1)
                scores[i] = float(np.nanmean(found))
        tried += [(score, rate, program) for score, rate in zip(scores, rates, strict=True)]
    _, rate, program = max(tried, key=lambda x: -np.inf if np.isnan(x[0]) else x[0])
    values, metrics = jax.device_get(program(jnp.arange(seeds), jnp.full(seeds, rate)))
    return Outcome(rate=rate, values=dict(values), curves=dict(metrics))


def train(
    study: Study,
    arm: Arm,
    recipe: Algorithm,
    policy: Policy,
    critic: Any,
    task: Task,
    start: Callable[[Array], PyTree],
    seed: Array,
    rate: Array,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One run: what it is worth in the end, and its metrics."""
    steps = study.steps if arm.steps is None else arm.steps
    options = {"policy": policy, "task": task, "critic": critic, "critic_optimizer": adamw(1e-2)}
    options |= {"prompts_per_step": study.prompts, **arm.options}
    params, key = start(seed), jax.random.fold_in(jax.random.key(7), seed)
    before = 0 if arm.first is None else min(arm.first[1], steps - 1)
    if arm.first is not None and before:
        parts = learner(arm.first[0], params=params, optimizer=adamw(rate), **options)
        params = run(parts, key, before, scan=before)[0].params["policy"]
    parts = learner(recipe, params=params, optimizer=adamw(rate), **options)
    if not study.watch:
        state, metrics = run(parts, key, steps - before, scan=steps - before)
        return evaluate(policy, task, state.params["policy"]), metrics

    def some(state: TrainState, _: None) -> tuple[TrainState, dict[str, Array]]:
        state, metrics = run(parts, None, study.watch, state=state, scan=study.watch)
        return state, {**metrics, "held_out": evaluate(policy, task, state.params["policy"])["avg@16"]}

    state, metrics = jax.lax.scan(some, parts.init(key), length=(steps - before) // study.watch)
    metrics = {name: x.reshape(-1) for name, x in metrics.items()}
    return evaluate(policy, task, state.params["policy"]), metrics


def evaluate(policy: Policy, task: Task, params: PyTree) -> dict[str, Array]:
    """Held-out: greedy accuracy, mean over samples, pass@k without bias, entropy, length."""
    prompts = task.test(TESTED)
    n = prompts.index.shape[0]
    context = jax.tree.map(lambda x: x[:, None], prompts.context)
    keys = jax.random.split(jax.random.key(11), (n, DRAWS))
    draw = functools.partial(policy.sample, params, length=task.response_length, eos=(task.tokenizer.eos_token_id,))
    greedy = draw(keys[:, :1], context, Sampling(temperature=jnp.zeros(())))
    samples = draw(keys, context, Sampling(temperature=jnp.ones(())))
    assert task.verify is not None
    right = task.verify(prompts, samples.tokens, samples.mask) >= 1
    count = right.sum(-1)
    tokens = jnp.maximum(samples.mask.sum(), 1)
    return {
        "accuracy": (task.verify(prompts, greedy.tokens, greedy.mask) >= 1).mean(),
        "avg@16": right.mean(),
        **{f"pass@{k}": pass_at(count, k).mean() for k in (2, 4, 8, 16)},
        "entropy": jnp.where(samples.mask, samples.entropy, 0).sum() / tokens,
        "tokens": samples.mask.sum(-1).mean(),
    }


def pass_at(count: Array, k: int) -> Array:
    """`1 - C(n - c, k) / C(n, k)` of `c` right answers in `n = DRAWS` (2107.03374)."""
    i = jnp.arange(k)
    return 1 - jnp.prod(jnp.clip(DRAWS - count[..., None] - i, 0) / (DRAWS - i), -1)


# --- what came of it --------------------------------------------------------------------------------------------------


def column(outcome: Outcome, name: str) -> np.ndarray:
    return np.asarray(outcome.values[name] if name in outcome.values else outcome.late(name), float)


def summary(study: Study, found: Mapping[str, Outcome]) -> dict[str, Any]:
    """Arms, comparisons and verdict, as they go into the file."""
    compared = [judged(c, found) for c in study.comparisons]
    return {
        "verdict": worst(compared),
        "arms": {
            name: {
                "rate": outcome.rate,
                "steps": int(next(iter(outcome.curves.values())).shape[1]),
                **{c: [float(v) for v in column(outcome, c)] for c in study.columns},
            }
            for name, outcome in found.items()
        },
        "comparisons": compared,
    }


def judged(c: Comparison, found: Mapping[str, Outcome]) -> dict[str, Any]:
    value = c.value if callable(c.value) else functools.partial(column, name=c.value)
    difference = value(found[c.arm]) - value(found[c.base]) if c.effect is None else c.effect(found)
    effect, low, high = bootstrap(np.asarray(difference, float))
    ahead, behind = sorted((c.sign * (low - c.margin), c.sign * (high - c.margin)))
    verdict = "reproduced" if ahead > 0 else "opposite" if behind < 0 else "not at this scale"
    about = {"main": c.main, "of": c.of}
    return {"text": c.text, "effect": effect, "low": low, "high": high, "verdict": verdict, **about}


def table(study: Study, result: Mapping[str, Any]) -> str:
    """Markdown: the claim, the arms, the comparisons, the verdict."""
    header = ["arm", "learning rate", "steps", *study.columns]
    rows = [
        [name, f"{arm['rate']:g}", str(arm["steps"]), *(spread(np.asarray(arm[c])) for c in study.columns)]
        for name, arm in result["arms"].items()
    ]
    effects = [
        [c["text"], f"{c['effect']:+.3f}", f"{c['low']:+.3f} to {c['high']:+.3f}", c["verdict"]]
        for c in result["comparisons"]
    ]
    return "\n".join(
        [
            f"# {result['experiment']}: {result['verdict']}",
            "",
            f"Claim: {result['Claim']}",
            "",
            f"Reported: {result['Reported']}",
            "",
            f"Mean ± standard deviation over {result['seeds']} seeds, {result['cpu_minutes']} CPU-minutes, "
            f"`python experiments/{result['experiment']}.py`.",
            "",
            *grid(header, rows),
            "",
            *grid(["compared", "effect", "95 % interval", "verdict"], effects),
            "",
        ]
    )


def picture(figure: Any, *, study: Study, found: Mapping[str, Outcome]) -> None:
    """What the study draws, or the metric it names, step by step."""
    draw = study.draw or functools.partial(curves, metric=study.picture)
    draw(figure.subplots(), found)
