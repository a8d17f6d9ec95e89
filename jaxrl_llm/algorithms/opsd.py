"""OPSD: on-policy self-distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from jax import Array

from jaxrl_llm.advantages.basic import uniform
from jaxrl_llm.algorithm import Algorithm, Slot
from jaxrl_llm.contexts import extend
from jaxrl_llm.losses.divergence import Divergence, from_teacher, jensen_shannon
from jaxrl_llm.losses.measured import MeasuredLoss
from jaxrl_llm.prompts.solution import solution, words
from jaxrl_llm.rollouts.group import sample_group
from jaxrl_llm.types import Prompts, Rollouts, World
from jaxrl_llm.updates.passes import one_pass


def with_solution_for_teacher(
    world: World, key: Array, prompts: Prompts, *, rollout: Callable[..., Rollouts], transition: tuple[int, ...]
) -> Rollouts:
    """Rollouts whose teacher reads the prompt, its logged solution and the token ids `transition`."""
    rollouts = rollout(world, key, prompts)
    return replace(rollouts, teacher=extend(rollouts.context, solution(rollouts.prompts), words(transition)))


def opsd(
    *,
    group_size: int = 1,
    divergence: Divergence = jensen_shannon,
    temperature: float = 1.1,
    transition: tuple[int, ...] = (),
    update: Slot = one_pass,
) -> Algorithm:
    """No reward: on its own responses the policy imitates, token by token, itself with the solution in context.

    Source: "Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models", 2601.18734.
    Deviations: rows the verifier cannot score are left out. The paper samples with top-p 0.95 and top-k 20, at
      most 2048 tokens, and lets only the teacher think: settings of the run here. Not here: the variant that looks at
      the sampled token alone.
    Limit: with an empty solution and transition, and a reference equal to the policy, loss and gradient are 0.
    Family: supervised and mixed data.

    Args:
      group_size: responses a prompt.
      divergence: `(student logits, teacher logits) -> [...]`, of beta 0.5; `partial(jensen_shannon, beta=...)` sets
        another, `forward_kl` and `reverse_kl` are its ends 0 and 1, and `partial(at_top, divergence=..., k=...)` looks
        at the teacher's most probable tokens only.
      temperature: of both distributions in the loss, which is not multiplied by its square.
      transition: ids of the text that asks the teacher to derive the solution itself, after it.  # () not in the paper
      update: `one_pass` keeps the teacher at the starting policy, as the released runs do;
        `partial(averaged_reference, decay=0.999)` lets it follow slowly, `decay=0.0` makes it the current policy.
    """
    return Algorithm(
        rollout=partial(
            with_solution_for_teacher, rollout=partial(sample_group, size=group_size), transition=transition
        ),
        advantage=uniform,
        loss=MeasuredLoss(name="divergence"),
        measures={"divergence": partial(from_teacher, divergence=divergence, temperature=temperature)},
        update=update,
    )
