"""Accuracy of a policy on held-out problems."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from jaxrl_llm.policy import Policy
from jaxrl_llm.sharding import on_all, on_mesh, over_data
from jaxrl_llm.tasks.task import Task, decode_prompts, decode_responses, host_verifier
from jaxrl_llm.types import Prompts, PyTree, Samples, Sampling


class Evaluation(NamedTuple):
    """Over the problems that could be scored, NaN if none.

    accuracy: share of greedy answers with reward 1. reward: mean of one sampled answer a problem. length: tokens of the
    greedy answers, mean. transcripts: the first few greedy answers.
    """

    accuracy: float
    reward: float
    length: float
    problems: int
    transcripts: list[dict[str, Any]]


def evaluator(
    policy: Policy,
    task: Task,
    *,
    problems: int = 512,
    batch: int = 128,
    response_length: int | None = None,
    sampling: Sampling | None = None,
    transcripts: int = 4,
    mesh: Mesh | None = None,
) -> Callable[..., Evaluation]:
    """`(params, key=None) -> Evaluation` on the task's first held-out problems, compiled once.

    Args:
      policy, task: what is evaluated, on what.
      problems: how many; the task's all, if it has fewer.
      batch: problems decoded at a time.
      response_length: tokens; the task's if None.
      sampling: of the answers whose mean reward is reported; temperature 1 if None.
      transcripts: how many to keep as text.
      mesh: where the parameters are, if they are split over devices; the problems are split there too.
    """
    length = task.response_length if response_length is None else response_length
    held_out = task.test(problems if task.report is None else min(problems, task.report.test))
    total = held_out.index.shape[0]
    batch = min(batch, total)
    sampling = jax.tree.map(jnp.asarray, sampling or Sampling())
    greedy = dataclasses.replace(sampling, temperature=jnp.zeros_like(sampling.temperature))
    grade = jax.jit(task.verify) if task.verify is not None else host_verifier(task)

    def answered(params: PyTree, key: Array, prompts: Prompts, sampling: Sampling) -> Samples:
        prompts = over_data(mesh, prompts)
        context = jax.tree.map(lambda x: x[:, None], prompts.context)
        fold = jax.vmap(functools.partial(jax.random.fold_in, key))
        keys = fold(jnp.arange(prompts.index.shape[0]))[:, None]
        eos = (task.tokenizer.eos_token_id,)
        return on_all(mesh, policy.sample(params, keys, context, sampling, length=length, eos=eos, stop=task.stop))

    program = jax.jit(on_mesh(mesh, answered))

    def answer(params: PyTree, key: Array, prompts: Prompts, sampling: Sampling) -> Samples:
        if mesh is None:
            alone: Samples = program(params, key, prompts, sampling)
            return alone
        found: Samples = program(params, key, jax.tree.map(np.asarray, prompts), sampling)
        found = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), found)  # every process grades all
        return found

    def evaluate(params: PyTree, key: Array | None = None) -> Evaluation:
        key = jax.random.key(0) if key is None else key
        scores: dict[str, list[np.ndarray]] = {"greedy": [], "sampled": []}
        lengths: list[np.ndarray] = []
        texts: list[dict[str, Any]] = []
        for i, (prompts, real) in enumerate(_batches(held_out, batch)):
            k = jax.random.fold_in(key, i)
            found = {"greedy": answer(params, k, prompts, greedy), "sampled": answer(params, k, prompts, sampling)}
            for how, samples in found.items():
                scores[how].append(np.asarray(grade(prompts, samples.tokens, samples.mask))[:real, 0])
            best = found["greedy"]
            lengths.append(np.asarray(best.mask.sum(-1))[:real, 0])
            if len(texts) < transcripts:
                words = zip(
                    decode_prompts(task.tokenizer, prompts),
                    decode_responses(task.tokenizer, best.tokens, best.mask),
                    scores["greedy"][-1],
                    strict=False,
                )
                texts += [{"prompt": p, "response": r[0], "reward": float(s)} for p, r, s in words]
        return Evaluation(
            accuracy=_mean(np.concatenate(scores["greedy"]) >= 1.0, np.concatenate(scores["greedy"])),
            reward=_mean(np.concatenate(scores["sampled"]), np.concatenate(scores["sampled"])),
            length=float(np.concatenate(lengths).mean()),
            problems=total,
            transcripts=texts[:transcripts],
        )

    return evaluate


def _mean(x: np.ndarray, score: np.ndarray) -> float:
    """Mean of `x` over the rows with a score."""
    scored = np.isfinite(score)
    return float(x[scored].mean()) if scored.any() else math.nan


def _batches(prompts: Prompts, size: int) -> Iterator[tuple[Prompts, int]]:
    """Equal batches (the last one repeats its last problem) with how many problems of each are real."""
    total = prompts.index.shape[0]
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        yield jax.tree.map(lambda x, rows=rows: x[rows], prompts), min(size, total - start)
