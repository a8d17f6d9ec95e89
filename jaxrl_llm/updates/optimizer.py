"""The optimiser of the field, with its numbers as arguments of the step."""

from __future__ import annotations

import optax
from jax import Array


def adamw(
    learning_rate: float | Array | optax.Schedule = 1e-6,
    *,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    max_norm: float | Array = 1.0,
) -> optax.GradientTransformation:
    """AdamW after clipping the gradient's global norm.

    All arguments live in the optimiser's state (`opt_state.hyperparams`), so changing one between steps, or sweeping it
    with `jax.vmap`, compiles nothing. `learning_rate` may be an optax schedule of the optimiser's step count.
    """

    # inject_hyperparams reads the names of the arguments.
    def build(learning_rate, b1, b2, eps, weight_decay, max_norm):  # type: ignore[no-untyped-def]
        adam = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
        return optax.chain(optax.clip_by_global_norm(max_norm), adam)

    return optax.inject_hyperparams(build)(
        learning_rate=learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, max_norm=max_norm
    )
