"""Recipes as data: what they hold, how they are shown, compared and changed; wrong ones fail in words."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxrl_llm import algorithms
from jaxrl_llm.advantages.group import center, per_group
from jaxrl_llm.algorithm import Algorithm, PolicyLoss, chain, changes, describe, numbers, optional, with_numbers
from jaxrl_llm.losses.kl import kl_to_reference
from jaxrl_llm.losses.surrogates import clip_min
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.types import Stage

SLOTS = {"rollout": partial(sample_group, size=4), "advantage": partial(per_group, center)}
CLIP = PolicyLoss(surrogate=partial(clip_min, low=0.2, high=0.3))


def test_floats_are_numbers_and_sizes_are_structure():
    assert {k: float(v) for k, v in numbers(Algorithm(**SLOTS, loss=CLIP)).items()} == pytest.approx(
        {"loss.surrogate.low": 0.2, "loss.surrogate.high": 0.3}
    )


def test_changed_numbers_change_nothing_else():
    recipe = algorithms.load("grpo")
    changed = with_numbers(recipe, {"loss.surrogate.low": 0.1})
    assert changes(changed, recipe) == {"loss.surrogate.low": ("0.2", "0.1")}
    assert changes(with_numbers(recipe, {}), recipe) == {}
    with pytest.raises(KeyError, match=r"no number at 'clip'.*loss\.surrogate\.low"):
        with_numbers(recipe, {"clip": 0.1})


def test_numbers_inside_a_trace_stay_traced():
    def doubled(x):
        return numbers(with_numbers(algorithms.load("grpo"), {"loss.surrogate.low": x}))["loss.surrogate.low"] * 2

    assert float(jax.jit(doubled)(0.25)) == 0.5


def test_describe_leaves_defaults_out():
    text = describe(algorithms.load("dr_grpo"))
    assert "token_sum_over" in text and "filter" not in text and "update" not in text


def test_changes_name_the_slot_where_functions_differ():
    assert set(changes(algorithms.load("rloo"), algorithms.load("reinforce"))) >= {"advantage"}
    assert changes(algorithms.load("grpo"), algorithms.load("grpo")) == {}


def test_an_unused_term_is_left_out_and_a_swept_one_stays():
    assert optional(kl_to_reference, weight=None) == optional(kl_to_reference, weight=0.0) == ()
    assert len(optional(kl_to_reference, weight=0.1)) == len(optional(kl_to_reference, weight=jnp.zeros(()))) == 1


@pytest.mark.parametrize(
    ("slot", "value", "words"),
    [
        ("loss", verified, r"loss needs a function of \(scores, batch\); verified\(batch"),
        ("reward", CLIP, r"reward needs a function of \(batch\)"),
        ("rollout", sample_group, "sample_group.*missing a required argument: 'size'"),
        ("advantage", 0.5, r"advantage needs a function of \(batch\), got 0.5"),
        ("filter", Stage(apply=verified), r"filter needs a function of \(memory, key, batch\); verified"),
        ("loss", chain(CLIP, CLIP), "loss cannot be a chain"),
        ("reward", chain(verified, 3), r"reward needs a function of \(batch\), got 3"),
    ],
)
def test_a_wrong_composition_fails_at_construction(slot, value, words):
    with pytest.raises(TypeError, match=words):
        Algorithm(**({**SLOTS, "loss": CLIP} | {slot: value}))


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match="at least one stage"):
        chain()


def test_a_recipe_is_replaced_like_any_dataclass():
    child = dataclasses.replace(algorithms.load("grpo"), advantage=partial(per_group, center))
    assert list(changes(child, algorithms.load("grpo"))) == ["advantage[0]"]
