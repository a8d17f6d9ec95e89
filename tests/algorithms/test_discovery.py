"""Methods are found by looking."""

import inspect

import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import Algorithm, describe
from jaxrl_llm.algorithms.spark import LABELS

# Sizes that default to the budget, and tuples no other value can be guessed for.
OTHER = {"limit": 40, "cache": 7, "max_length": 11, "between": (3,), "marker": (3,), "window": 9}
OF_METHOD = {
    "drive": {"steps": (32, 64, 16), "keep": (72, 50, 20)},
    "hbpo": {"budgets": (512, 1024, 2048, 4096), "sentences": ((1,), (2,), (3,), (4,))},
    "props": {"group_size": 10, "rounds": 3},
    "rollout_gdro": {"smallest": 3, "largest": 9},
    "spark": {"words": LABELS._replace(right=(7,))},
    "spo_tree": {"branch": (3, 2)},
    "xrpo": {"group_size": 18, "rounds": 4, "base": 10},
}


def others(name, parameter):
    """Values unlike the default, of its kind: integers are sizes, and not every size fits the others."""
    default = parameter.default
    given = OTHER | OF_METHOD.get(name, {})
    if parameter.name in given:
        return [given[parameter.name]]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, tuple) and len(default) > 1:
        return [default[:-1]]
    if isinstance(default, int):
        sizes = (default + 1, 2 * default, default - 1, default // 2, default + 8)
        return [n for n in sizes if n != default]
    return [0.123]


def first_that_fits(function, parameter, values):
    for value in values:
        try:
            return function(**{parameter.name: value})
        except ValueError as error:
            refused = error
    raise refused


def test_names_and_load():
    assert {"grpo", "ppo", "sft", "dpo"} <= set(algorithms.names())
    assert algorithms.names() == sorted(algorithms.names())
    for name in algorithms.names():
        assert isinstance(algorithms.load(name), Algorithm)


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dr_grpo'"):
        algorithms.load("dr-grpo")
    with pytest.raises(ValueError, match="did you mean 'gspo'"):
        algorithms.load("GSPO")
    with pytest.raises(ValueError, match="no algorithm 'xxxxxxxx'; there are"):
        algorithms.load("xxxxxxxx")


def test_unknown_arguments_are_told_the_valid_ones():
    with pytest.raises(TypeError, match="grpo has no argument 'klw'; it has group_size, clip, kl"):
        algorithms.load("grpo", klw=0.1)


@pytest.mark.parametrize("name", algorithms.names())
def test_no_argument_is_silently_ignored(name):
    """Every argument given another value changes the recipe."""
    function = algorithms.recipe(name)
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}({parameter.name}) must be keyword-only"
        if callable(parameter.default):
            continue
        other = first_that_fits(function, parameter, others(name, parameter))
        assert describe(other) != describe(function()), f"{name} ignores {parameter.name}"


@pytest.mark.parametrize("name", algorithms.names())
def test_docstrings_give_source_deviations_and_limit(name):
    doc = inspect.getdoc(algorithms.recipe(name)) or ""
    assert all(part in doc for part in ("Source:", "Deviations:", "Limit:"))


@pytest.mark.parametrize("name", algorithms.names())
def test_a_recipe_file_is_short_and_has_no_numerics(name):
    module = inspect.getmodule(algorithms.recipe(name))
    source = inspect.getsource(module)
    assert len(source.splitlines()) <= 120
    assert "jnp" not in inspect.getsource(algorithms.recipe(name))
