"""CAPO: curvature-aware policy optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from jaxrl_llm.advantages.group import center_scale, per_group
from jaxrl_llm.algorithm import Algorithm, chain
from jaxrl_llm.algorithms.grpo import grpo
from jaxrl_llm.weights.curvature import hidden_state, of_all_rows, top_ids, top_logits, within_curvature


def capo(
    *,
    group_size: int = 8,
    top: int = 50,
    objective_bound: float = 1e-2,
    policy_bound: float = 1e-4,
    learning_rate: float = 1.5e-5,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    symmetric: bool = True,
) -> Algorithm:
    """`grpo` without the tokens whose own gradient step would change the objective or the policy too much.

    What a step would change is predicted to second order for the last layer alone, along the direction Adam would
    take. Rejected tokens leave the loss and its denominators. Weight and measures fit other parents:
    `replace(dr_grpo(), weight=capo(objective_bound=5e-4, policy_bound=1e-3).weight, measures=capo().measures)` is
    Dr. CAPO.

    Source: "Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning", 2510.00819, and
      its released code.
    Deviations: hidden states are those that predict the token (the released code reads one position later). Samples at
      another temperature than 1 divide logits and hidden state by it. Adam's numbers are a copy of the optimiser's
      that no schedule changes: keep `learning_rate` what the optimiser's is.
    Limit: with both bounds infinite it is `grpo` with kl=None and 1e-4 added to the standard deviation.
    Family: optimiser and structure.

    Args:
      group_size: 8 in the paper.
      top: logits of a position that are looked at; the sampler's top_k in the paper.  # 50: not in the paper
      objective_bound: delta_H; 5e-4 on Dr. GRPO, 0.1 on REINFORCE.
      policy_bound: delta_F; 1e-3 on Dr. GRPO, 1e-5 on REINFORCE.
      learning_rate: the optimiser's, which a recipe cannot see; the paper's aggressive one (3e-6: its conservative).
      b1: the optimiser's.
      b2: the optimiser's.
      eps: the optimiser's.
      symmetric: whether the objective may fall, too, as in the released recipes.

    Raises:
      ValueError: no logits to look at.
    """
    if top < 1:
        raise ValueError(f"capo looks at the highest logits of a position: top must be at least 1, got {top}")
    selection = within_curvature(
        objective_bound=objective_bound,
        policy_bound=policy_bound,
        rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        symmetric=symmetric,
    )
    return replace(
        grpo(group_size=group_size, kl=None),
        measures={
            "hidden_state": hidden_state,
            "top_logits": partial(top_logits, k=top),
            "top_ids": partial(top_ids, k=top),
        },
        advantage=partial(per_group, partial(center_scale, eps=1e-4)),
        weight=chain(selection, of_all_rows),
    )
