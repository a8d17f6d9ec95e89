"""Arguments of recipes and tasks, given by name as plain values."""

from __future__ import annotations

import difflib
import inspect
import sys
import typing
from collections.abc import Callable
from types import NoneType
from typing import Any


def arguments(function: Callable[..., Any], given: dict[str, Any], option: str) -> dict[str, Any]:
    """`given` as arguments of `function`: integers where it takes floats become floats, names become functions.

    A function argument is given by the name of a function that stands where its default does.

    Raises:
      ValueError: an argument it does not have (the nearest spelling is named), or a value of another type.
    """
    parameters, hints = inspect.signature(function).parameters, typing.get_type_hints(function)
    known = [name for name, p in parameters.items() if isinstance(p.default, NoneType | bool | int | float | str)]
    known += [name for name, p in parameters.items() if inspect.isfunction(p.default)]
    result = {}
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            has = ", ".join(known) or "none"
            raise ValueError(f"{option}: {function.__name__} has no {name!r}; {hint}it has {has}")
        default = parameters[name].default
        if inspect.isfunction(default) and isinstance(value, str):
            value = getattr(sys.modules[default.__module__], value, value)
        result[name] = _fitting(value, hints[name], f"{option} {name}")
    return result


def _fitting(value: Any, hint: Any, what: str) -> Any:
    options = typing.get_args(hint) or (hint,)  # of a union: its members
    if Any in options:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and float in options and int not in options:
        return float(value)
    simple = [t for t in (bool, int, float, str, NoneType) if t in options]
    plain = isinstance(value, bool | int | float | str | NoneType)
    if (plain and type(value) not in simple) or (not plain and not callable(value)):
        names = sorted("none" if t is NoneType else t.__name__ for t in simple) or ["the name of a function"]
        raise ValueError(f"{what}: expected {' or '.join(names)}, got {value!r}")
    return value
