"""The divergence from the reference as a reward."""

from __future__ import annotations

import jax
from jax import Array

from jaxrl_llm.rewards.basic import token_rewards_so_far
from jaxrl_llm.types import POLICY, Batch, masked


def kl_in_reward(batch: Batch, *, weight: float | Array) -> Array:
    """Subtracts `weight * (l_behaviour - l_ref)` from each token the policy chose, `[B G T]` (k1, in nats).

    A later stage of a reward chain: the reward so far stays where it is (the outcome at the row's last token). The
    log-probs are those of sampling time, so this carries no gradient (Stiennon et al., 2009.01325).

    Raises:
      ValueError: the reference was not scored.
    """
    if batch.reference is None or batch.reference.logp is None:
        raise ValueError("kl_in_reward needs batch.reference.logp: train with a reference (the engine adds it)")
    chosen = batch.rollouts.mask & (batch.rollouts.role == POLICY)
    k1 = masked(chosen, batch.rollouts.logp - batch.reference.logp)
    return token_rewards_so_far(batch) - weight * jax.lax.stop_gradient(k1)
