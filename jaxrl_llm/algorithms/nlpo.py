"""NLPO: natural language policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import Algorithm, PolicyLoss
from jaxrl_llm.algorithms.ppo import ppo
from jaxrl_llm.rollouts.distribution import FAR, filtered
from jaxrl_llm.types import Batch, Metrics, Prompts, Rollouts, Sampling, Scores, World
from jaxrl_llm.updates.lagged import renewed_copy
from jaxrl_llm.updates.passes import several_passes


def nucleus(logits: Array, *, mass: float | Array, least: int = 1, always: tuple[int, ...] = ()) -> Array:
    """`[... V]` bool: the fewest most probable tokens of that mass, the `least` most probable ones, and `always`."""
    chosen = filtered(logits, Sampling(top_p=mass)) > FAR
    if least > 1:
        chosen |= filtered(logits, Sampling(top_k=least)) > FAR
    return chosen if not always else chosen.at[..., jnp.array(always)].set(True)


def sample_within(
    world: World, key: Array, prompts: Prompts, *, size: int, allow: Callable[[Array], Array]
) -> Rollouts:
    """Groups drawn from the policy renormalised over what its lagged copy allows."""
    lagged = world.models.get("lagged", world.models["policy"])
    return world.sample(key, prompts, size, within=(lagged, allow))


def nucleus_logp(
    logits: Array,
    tokens: Array,
    hidden: Array,
    *,
    lagged: Array,
    allow: Callable[[Array], Array],
    temperature: float | Array = 1.0,
) -> Array:
    """Log-prob of the token, renormalised over what the lagged copy allows, `[...]`. The token itself always counts."""
    inside = allow(lagged) | (jnp.arange(logits.shape[-1]) == tokens[..., None])
    z = jax.nn.log_softmax(jnp.where(inside, logits / temperature, FAR))
    return jnp.take_along_axis(z, tokens[..., None], -1)[..., 0]


@dataclass(frozen=True, kw_only=True)
class Within:
    """`loss`, to which the log-prob of a token is the one among the allowed tokens, as it was to the sampler."""

    loss: PolicyLoss

    @property
    def aggregate(self) -> Callable[[Array], Array]:
        return self.loss.aggregate

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        """Raises ValueError if the measure is missing."""
        if "nucleus_logp" not in scores.extras:
            raise ValueError("Within needs scores.extras['nucleus_logp']: put it into the recipe's measures")
        return self.loss(replace(scores, logp=scores.extras["nucleus_logp"]), batch)


def nlpo(
    *,
    group_size: int = 1,
    mass: float = 0.9,
    least: int = 1,
    always: tuple[int, ...] = (),
    every: int = 20,
    temperature: float = 1.0,
    clip: float = 0.2,
    kl: float | None = 0.001,
    epochs: int = 4,
    minibatches: int = 1,
) -> Algorithm:
    """`ppo` among the tokens that a lagged copy of the policy finds likely: a vocabulary of tens, not of thousands.

    Behaviour and learner are both the policy renormalised over the copy's nucleus, which is renewed every few steps.

    Source: "Is Reinforcement Learning (Not) for Natural Language Processing", 2210.01241, NLPO, and its released code.
    Deviations: the weight of the divergence stays what it is (theirs follows a target), no epoch ends early, special
      tokens are allowed if `always` names them. Metrics of entropy and sampler gap are the unrestricted policy's.
    Limit: with mass=1 it is `ppo` with the same kl.
    Family: optimiser and structure.

    Args:
      group_size: responses a prompt.
      mass: top-p of the nucleus.
      least: tokens it has at least; depends on the task in the paper, about 100.  # 1: not in the paper
      always: token ids that are always allowed; the special tokens in the paper.
      every: mu, steps between renewals of the copy; 5 on IMDB.
      temperature: the sampler's, which a measure does not see.  # 1: the library's default
      clip: both widths.
      kl: weight of `log(pi / pi_ref)` in the reward, 0.001 to 0.2 in the paper.
      epochs: passes over a batch.  # not in the paper as one number
      minibatches: optimiser steps a pass.  # not in the paper

    Raises:
      ValueError: an empty nucleus, or no step between renewals.
    """
    if least < 1 or every < 1:
        raise ValueError(f"nlpo: least and every must be at least 1, got {least} and {every}")
    parent = ppo(group_size=group_size, clip=clip, kl=kl)
    assert isinstance(parent.loss, PolicyLoss)
    allow = partial(nucleus, mass=mass, least=least, always=always)
    return replace(
        parent,
        rollout=partial(sample_within, size=group_size, allow=allow),
        measures={"nucleus_logp": partial(nucleus_logp, allow=allow, temperature=temperature)},
        loss=Within(loss=parent.loss),
        update=partial(
            renewed_copy, every=every, update=partial(several_passes, epochs=epochs, minibatches=minibatches)
        ),
    )
