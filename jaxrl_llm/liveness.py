"""Which inputs a traced function reads: how the engine knows what a recipe must pay for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def reads(function: Callable[..., Any], *args: Any) -> Any:
    """Traces `function` and says, leaf by leaf of `args`, whether an output depends on it.

    Conservative: a leaf handed to a loop or a branch counts as read even if the body ignores it.

    Args:
      function: any function of pytrees of arrays.
      args: arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      `args` with a bool in place of every leaf.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    live = _live_inputs(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars))
    return jax.tree.unflatten(jax.tree.structure(args), live)


def _live_inputs(jaxpr: Any, wanted: list[bool]) -> list[bool]:
    live = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, core.Literal)}
    for eqn in reversed(jaxpr.eqns):
        out = [v in live for v in eqn.outvars]
        if not any(out) and not eqn.effects:
            continue
        used = [True] * len(eqn.invars)
        if eqn.primitive.name in ("jit", "pjit"):
            used = _live_inputs(eqn.params["jaxpr"].jaxpr, out)
        live |= {v for v, u in zip(eqn.invars, used, strict=True) if u and not isinstance(v, core.Literal)}
    return [v in live for v in jaxpr.invars]
