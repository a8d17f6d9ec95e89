"""One file a method; the public function of a module has the module's name. Found by looking, not by registering."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from jaxrl_llm.algorithm import Algorithm


def names() -> list[str]:
    """Every method, sorted."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def recipe(name: str) -> Callable[..., Algorithm]:
    """The function that builds a method.

    Raises:
      ValueError: there is no such method.
    """
    if name not in names():
        near = difflib.get_close_matches(name.lower().replace("-", "_"), names(), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"no algorithm {name!r}; {hint}")
    function: Callable[..., Algorithm] = getattr(importlib.import_module(f"{__name__}.{name}"), name)
    return function


def load(name: str, **kwargs: Any) -> Algorithm:
    """The method with the given arguments, the paper's defaults for the others.

    Raises:
      ValueError: there is no such method.
      TypeError: it has no such argument.
    """
    function = recipe(name)
    valid = inspect.signature(function).parameters
    if unknown := sorted(set(kwargs) - set(valid)):
        raise TypeError(f"{name} has no argument {unknown[0]!r}; it has {', '.join(valid) or 'none'}")
    return function(**kwargs)
