"""Prompts as the task drew them."""

from jaxrl_llm.types import Prompts


def as_drawn(prompts: Prompts) -> Prompts:
    """The prompts, unchanged."""
    return prompts
