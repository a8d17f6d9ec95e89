"""Bayesian policy gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm
from jaxrl_llm.algorithms.reinforce import reinforce
from jaxrl_llm.losses.likelihood import weighted_logp
from jaxrl_llm.stats import masked_mean
from jaxrl_llm.types import Batch, Learn, Metrics, PyTree, masked
from jaxrl_llm.updates.passes import select

Posterior = Callable[..., tuple[Array, Array]]


def row_scores(learn: Learn, models: Any, batch: Batch) -> PyTree:
    """`u_i`, the gradient of every row's log-prob: leaves `[B G ...]`, a copy of the policy for each row."""
    b, g = batch.rows.shape

    def of(prompt: Array, row: Array) -> PyTree:
        one = jnp.broadcast_to((jnp.arange(g) == row)[None, :, None], (1, *batch.mask.shape[1:]))
        alone = replace(select(batch, prompt[None]), advantage=one.astype(jnp.float32))
        objective = learn.objective(models, alone, weighted_logp)
        return jax.grad(lambda p: objective({"policy": p})[0])(models[0]["policy"])

    scores: PyTree = jax.vmap(jax.vmap(of, (None, 0)), (0, None))(jnp.arange(b), jnp.arange(g))
    return scores


def inner_products(scores: PyTree, keep: Array) -> Array:
    """`Q = U^T U`, `[M M]`, of the rows that count."""
    flat = [masked(keep.ravel()[:, None], x.reshape(keep.size, -1)) for x in jax.tree.leaves(scores)]
    return sum(jnp.dot(x, x.T, precision=jax.lax.Precision.HIGHEST) for x in flat)  # type: ignore[return-value]


def fisher(gram: Array, rows: Array, ridge: float | Array) -> tuple[Array, Array]:
    """`U^T G^-1 U` and `rows * (Q + rows * ridge * I)^-1`, both `[M M]`, with `G = U U^T / rows + ridge * I`.

    `G^-1 U c = U n` with `n` the second times `c`: the natural gradient needs no matrix of the parameters' size. Both
    are 0 in directions that no row has.
    """
    values, vectors = jnp.linalg.eigh(gram)
    real = values > jnp.finfo(values.dtype).eps * values.size * values[-1]  # type: ignore[no-untyped-call]
    inverse = masked(real, rows / (jnp.where(real, values, 1.0) + rows * ridge))
    return (vectors * (values * inverse)) @ vectors.T, (vectors * inverse) @ vectors.T


def scalar_returns(
    returns: Array, kernel: Array, gram: Array, keep: Array, *, noise: float | Array
) -> tuple[Array, Array]:
    """Model 2, a process over returns: `c = C y` with `C = (K + noise I)^-1`, and `trace(U U^T / M - U C U^T)`.

    The posterior mean of the gradient is `U c`, its covariance what the trace is of.
    """
    inverse = jnp.linalg.inv(kernel + noise * jnp.eye(keep.size))
    return inverse @ returns, jnp.trace(gram) / jnp.maximum(keep.sum(), 1) - jnp.sum(inverse * gram)


def vector_returns(
    returns: Array, kernel: Array, gram: Array, keep: Array, *, noise: float | Array
) -> tuple[Array, Array]:
    """Model 1, a process over score times return: `c_i = y_i (C b)_i`, and the variance of each component.

    `K = (1 + k)^2`, `b_i = 1 + k_ii` and `b_0 = 1 + mean_i k_ii` (the number of parameters that the rows can tell).
    """
    diagonal = masked(keep, 1 + jnp.diag(kernel))
    inverse = jnp.linalg.inv(masked(keep & keep[:, None], jnp.square(1 + kernel)) + noise * jnp.eye(keep.size))
    return returns * (inverse @ diagonal), masked_mean(diagonal, keep) - diagonal @ inverse @ diagonal


def posterior_step(
    key: Array, models: Any, batch: Batch, learn: Learn, *, posterior: Posterior, ridge: float | Array, natural: bool
) -> tuple[Any, Metrics]:
    """The recipe's step, each row weighted so that the gradient is the posterior's mean."""
    keep, rows = batch.rows.ravel(), jnp.maximum(batch.rows.sum(), 1)
    gram = inner_products(row_scores(learn, models, batch), batch.rows)
    kernel, naturally = fisher(gram, rows, ridge)
    returns = masked_mean(batch.advantage, batch.mask, axis=-1).ravel()  # type: ignore[arg-type]
    weights, variance = posterior(returns, kernel, gram, keep)
    weights = masked(keep, naturally @ weights if natural else weights).reshape(batch.rows.shape)
    credit = masked(batch.mask, jnp.broadcast_to(rows * weights[..., None], batch.mask.shape))
    models, metrics = learn(models, replace(batch, advantage=credit))
    return models, {**metrics, "gradient_variance": variance}


def bayes_pg(
    *,
    group_size: int = 4,
    noise: float = 0.1,
    ridge: float = 1e-3,
    natural: bool = False,
    model: Posterior = scalar_returns,
) -> Algorithm:
    """`reinforce` whose gradient is the posterior mean of a Gaussian process over responses (Bayesian quadrature).

    Responses whose scores point the same way say one thing twice. For tiny policies: a step holds all their gradients.

    Source: Ghavamzadeh, Engel and Valko, "Bayesian Policy Gradient and Actor-Critic Algorithms", JMLR 2016.
    Deviations: the equations are the standard ones, not read again in the paper. Returns are less the step's mean
      reward, as in `reinforce`; the Fisher matrix is estimated from the step's responses; no sparsification.
    Limit: as `noise` grows the gradient becomes that of `reinforce` times `rows / noise` (with `scalar_returns`).
    Family: credit.

    Args:
      group_size: responses a prompt; `B * G` is at most some hundreds.  # not in the paper
      noise: variance of a return about the process.  # 0.1: not in the paper
      ridge: added to the Fisher matrix.  # 1e-3: not in the paper
      natural: multiply by the inverse of the Fisher matrix.
      model: `scalar_returns` (model 2) or `vector_returns` (model 1).
    """
    step = partial(posterior_step, posterior=partial(model, noise=noise), ridge=ridge, natural=natural)
    return replace(reinforce(group_size=group_size), update=step)
