"""Tasks: prompts and verifiers. A module with a public function of its own name is a task, found by that name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

from jaxrl_llm.tasks.task import Report, Task, decode_prompts, decode_responses, host_verifier, pad_tokens

__all__ = ["Report", "Task", "decode_prompts", "decode_responses", "host_verifier", "load", "names", "pad_tokens"]


def load(name: str, **knobs: Any) -> Task:
    """The task called `name`, with its knobs.

    Raises:
      ValueError: no such task; the message lists the known ones and the nearest spelling.
      TypeError: a knob the task does not have, or a required one missing.
    """
    maker = _maker(name) if name in _modules() else None
    if maker is None:
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no task {name!r}; {hint}the tasks are {', '.join(names())}")
    parameters = inspect.signature(maker).parameters
    if unknown := sorted(set(knobs) - set(parameters)):
        raise TypeError(f"task {name} has no knob {unknown[0]!r}; it has {', '.join(parameters)}")
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(required - set(knobs)):
        raise TypeError(f"task {name} needs the knob {missing[0]!r}")
    return maker(**knobs)


def names() -> list[str]:
    """The tasks there are, sorted."""
    return sorted(name for name in _modules() if _maker(name))


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _maker(name: str) -> Callable[..., Task] | None:
    module = importlib.import_module(f"{__name__}.{name}")
    maker = getattr(module, name, None)
    return maker if inspect.isfunction(maker) and maker.__module__ == module.__name__ else None
