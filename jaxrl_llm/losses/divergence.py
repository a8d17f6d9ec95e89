"""Divergences between two distributions over the vocabulary, from logits `[... V]`, in nats `[...]`.

The student comes first. A recipe computes one as a measure, where the logits are:
`measures={"divergence": partial(from_teacher, divergence=partial(jensen_shannon, beta=0.5))}`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import masked

Divergence = Callable[[Array, Array], Array]


def forward_kl(student: Array, teacher: Array) -> Array:
    """`KL(teacher || student)`."""
    return _kl(jax.nn.log_softmax(teacher), jax.nn.log_softmax(student))


def reverse_kl(student: Array, teacher: Array) -> Array:
    """`KL(student || teacher)`."""
    return _kl(jax.nn.log_softmax(student), jax.nn.log_softmax(teacher))


def jensen_shannon(student: Array, teacher: Array, *, beta: float | Array = 0.5) -> Array:
    """`b KL(t || M) + (1 - b) KL(s || M)`, `M = (1 - b) s + b t` (GKD, 2306.13649, eq. 1), gradients through `M` too.

    `0 < b < 1`. Divided by `b` it tends to `forward_kl` as `b` goes to 0, and by `1 - b` to `reverse_kl` at 1: papers
    that write 0 and 1 for the ends mean those functions.
    """
    s, t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    middle = jnp.logaddexp(jnp.log1p(-beta) + s, jnp.log(beta) + t)
    return beta * _kl(t, middle) + (1 - beta) * _kl(s, middle)


def at_top(student: Array, teacher: Array, *, divergence: Divergence, k: int) -> Array:
    """`divergence` over the teacher's `k` most probable tokens, both renormalised over them.

    Raises:
      ValueError: `k` is not in 2 ... V.
    """
    if not 2 <= k <= teacher.shape[-1]:
        raise ValueError(f"at_top: k must be 2 to the {teacher.shape[-1]} tokens of the vocabulary, got {k}")
    _, top = jax.lax.top_k(teacher, k)
    return divergence(jnp.take_along_axis(student, top, axis=-1), jnp.take_along_axis(teacher, top, axis=-1))


def from_teacher(
    logits: Array,
    tokens: Array,
    hidden: Array,
    *,
    teacher: Array,
    divergence: Divergence,
    temperature: float | Array = 1.0,
) -> Array:
    """A measure: `divergence` of the policy from what the reference says after `rollouts.teacher`, `[...]`.

    `temperature` divides the logits of both; the result is not multiplied by its square.
    """
    return divergence(logits / temperature, teacher / temperature)


def from_reference(
    logits: Array,
    tokens: Array,
    hidden: Array,
    *,
    reference: Array,
    divergence: Divergence,
    temperature: float | Array = 1.0,
) -> Array:
    """A measure: as `from_teacher`, of what the reference says in the policy's own context."""
    return divergence(logits / temperature, reference / temperature)


def _kl(p: Array, q: Array) -> Array:
    """`KL(p || q)` of log-probabilities; tokens of probability 0 under `p` add nothing."""
    some = jnp.isfinite(p)
    p, q = masked(some, p), masked(some, q)
    return jnp.sum(masked(some, jnp.exp(p) * (p - q)), axis=-1)
