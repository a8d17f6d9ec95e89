"""What every step reports, as scalars. `/mean`, `/min` and `/max` are over the tokens or rows that count."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import POLICY, Batch, Metrics, Rollouts, Scores, masked


def mean(mask: Array, x: Array) -> Array:
    """Mean of `x` over `mask`; 0 if nothing counts."""
    return masked(mask, x.astype(jnp.float32)).sum() / jnp.maximum(mask.sum(), 1)


def spread(name: str, mask: Array, x: Array) -> Metrics:
    """`{name/mean, name/min, name/max}` of `x` over `mask`; 0 if nothing counts."""
    some = mask.any()
    return {
        f"{name}/mean": mean(mask, x),
        f"{name}/min": jnp.where(some, jnp.min(x, where=mask, initial=jnp.inf), 0.0),
        f"{name}/max": jnp.where(some, jnp.max(x, where=mask, initial=-jnp.inf), 0.0),
    }


def of_batch(batch: Batch, scored: Array) -> Metrics:
    """What is known before the update. `scored` `[B G]`: rows the verifier could score."""
    rollouts, rows = batch.rollouts, batch.rows
    exists = rollouts.mask.any(-1)
    lengths = rollouts.lengths.astype(jnp.float32)
    groups = scored.any(-1)
    reward = batch.outcome if batch.reward is None else batch.reward
    low = jnp.min(reward, axis=-1, where=scored, initial=jnp.inf)
    high = jnp.max(reward, axis=-1, where=scored, initial=-jnp.inf)
    return {
        **spread("reward", scored, reward),
        **spread("length", exists, lengths),
        "accuracy": mean(scored, batch.outcome >= 1.0),
        "pass_at_group": mean(groups, (scored & (batch.outcome >= 1.0)).any(-1)),
        # A tolerance: rewards with a divergence in them differ by rounding where they are equal.
        "zero_variance_groups": mean(groups, high - low <= 1e-6 * jnp.maximum(1.0, jnp.abs(high))),
        "kept_rows": mean(jnp.ones_like(rows), rows),
        "unscored_rows": mean(exists, ~scored),
        "truncated": mean(exists, rollouts.truncated),
        "entropy": mean(rollouts.mask & (rollouts.role == POLICY), rollouts.entropy),
        "advantage/abs": mean(batch.mask, jnp.abs(batch.advantage)) if batch.advantage is not None else jnp.zeros(()),
        "tokens/generated": generated(rollouts),
        "tokens/updated": batch.mask.sum().astype(jnp.float32),
    }


def generated(rollouts: Rollouts) -> Array:
    """Tokens the sampler made for these rollouts, those of discarded groups included."""
    if rollouts.generated is not None:
        return rollouts.generated.sum()
    return (rollouts.role == POLICY).sum().astype(jnp.float32)


def of_scores(scores: Scores, batch: Batch) -> Metrics:
    """Per-token quantities of one optimiser step that no loss has to compute."""
    chosen = batch.mask & (batch.rollouts.role == POLICY)
    if scores.logp is None:
        return {}
    return {"gap": masked(chosen, jnp.abs(scores.logp - batch.rollouts.logp))}


def summarise(metrics: Metrics, batch: Batch) -> Metrics:
    """Reduces `[B G T]` and `[B G]` entries over what counts; scalars pass."""
    result: Metrics = {}
    for name, x in metrics.items():
        x = jnp.asarray(x)
        if x.ndim == 0:
            result[name] = x
            continue
        mask = batch.mask if x.ndim == 3 else batch.rows
        result |= {name: mean(mask, x)} if x.dtype == bool or name.startswith("loss/") else spread(name, mask, x)
    return result
