"""Methods are found by looking."""

import inspect

import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.algorithm import Algorithm, describe

OTHER = {"group_size": 3, "rounds": 4, "limit": 40, "cache": 7, "minibatches": 5, "epochs": 7, "max_length": 11}
OTHER |= {"age": 3, "completions": 4, "edges": 9, "first": 5, "interval": 7, "members": 3, "oversample": 3}
OTHER |= {"pretraining": 9, "segment": 9, "sets": 3, "size": 6, "vines": 3, "whitened": False, "window": 9}
# Where a value above would not do.
OF_METHOD = {"spo_tree": {"branch": (3, 2)}, "treepo": {"branch": 3, "group_size": 9}}


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
        other = (OTHER | OF_METHOD.get(name, {})).get(parameter.name, 0.123)
        assert describe(function(**{parameter.name: other})) != describe(function()), f"{name} ignores {parameter.name}"


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
