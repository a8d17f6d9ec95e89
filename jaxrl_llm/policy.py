"""What the engine asks of a policy: text, and the likelihood of text. It need not be autoregressive."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.heads import hidden_states
from jaxrl_llm.models.model import Model
from jaxrl_llm.rollouts.distribution import log_prob
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.types import PyTree, Rollouts, Samples, Sampling, Scores, masked

Head = Callable[[Array], Array]
Extra = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything the engine knows of a policy.

    init: `(key) -> params`.
    sample: `(params, keys [B G], context: Context [B C S], sampling, *, length, eos, stop) -> Samples [B G T]`.
    score: `(params, rollouts, fields, heads={}) -> Scores`: the requested fields of the responses under
        `rollouts.context` and `rollouts.sampling`; `heads` maps a field to `(hidden [B G T D]) -> [B G T ...]`.
    """

    vocab: int
    init: Callable[[Array], PyTree]
    sample: Callable[..., Samples]
    score: Callable[..., Scores]


def language_model(model: Model, *, slots: int | None = None, logits_bytes: int = 2**30) -> Policy:
    """An autoregressive policy.

    Args:
      model: the network.
      slots: rows that decode at once, refilled as they finish; `None` decodes all rows together.
      logits_bytes: scores whose float32 logits take more are computed in chunks of about this many bytes of logits (a
          gradient holds a few arrays of that size), and each chunk's logits a second time for the gradient.
    """
    return Policy(
        vocab=model.vocab,
        init=model.init,
        sample=functools.partial(sample, model, slots=slots),
        score=functools.partial(score, model, logits_bytes=logits_bytes),
    )


def mean_logp(logits: Array, tokens: Array, hidden: Array) -> Array:
    """Mean over the vocabulary of the log-probabilities at temperature 1, `[...]` nats.

    Self-certainty is `-mean_logp - log V`, the KL divergence from the uniform distribution to the policy (2502.18581).
    """
    return logits.mean(-1) - jax.nn.logsumexp(logits, axis=-1)


def top_logp(logits: Array, tokens: Array, hidden: Array) -> Array:
    """Log-probability of the most probable token at temperature 1, `[...]` nats."""
    return logits.max(-1) - jax.nn.logsumexp(logits, axis=-1)


# What a recipe may ask for besides likelihoods: `(logits [... V], tokens [...], hidden [... D]) -> [...]`.
EXTRAS: dict[str, Extra] = {"mean_logp": mean_logp, "top_logp": top_logp}


def score(
    model: Model,
    params: PyTree,
    rollouts: Rollouts,
    fields: frozenset[str],
    heads: Mapping[str, Head] | None = None,
    *,
    logits_bytes: int = 2**30,
) -> Scores:
    """Scores of the responses under `rollouts.context`: one forward pass, and logits only for fields that need them.

    Args:
      fields: of "logp", "entropy", names in `EXTRAS`, and names in `heads`.
      heads: `(hidden [B G T D]) -> [B G T ...]` by field; all but "value" land in `extras`.
      logits_bytes: see `language_model`.

    Returns:
      the requested fields, 0 at masked places whatever stands there.

    Raises:
      ValueError: a field nobody can compute, or contexts that do not divide the group.
    """
    heads = heads or {}
    if unknown := sorted(fields - {"logp", "entropy", *EXTRAS, *heads}):
        known = ", ".join(["logp", "entropy", *EXTRAS, *heads])
        raise ValueError(f"no score named {unknown[0]!r}; this policy has {known} (a 'value' needs a critic's head)")
    if not fields:
        return Scores()
    mask = rollouts.mask
    # Zero where nobody may look, so that neither a value nor a gradient of such a place can reach the result.
    hidden = masked(mask[..., None], hidden_states(model, params, rollouts))
    found = {name: heads[name](hidden) for name in fields & set(heads)}
    if of_logits := fields - set(heads):
        chunk = functools.partial(_of_logits, model, of_logits)
        tokens = jnp.where(mask, rollouts.tokens, 0)
        found |= _chunked(chunk, params, hidden, tokens, rollouts.sampling, model.vocab, logits_bytes)
    found = {k: masked(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x) for k, x in found.items()}
    named = {name: found.pop(name) for name in ("logp", "entropy", "value") if name in found}
    return Scores(**named, extras=found)


def _of_logits(
    model: Model, fields: frozenset[str], params: PyTree, hidden: Array, tokens: Array, sampling: Sampling
) -> dict[str, Array]:
    logits = model.logits(params, hidden)
    found = {name: EXTRAS[name](logits, tokens, hidden) for name in fields if name in EXTRAS}
    if fields & {"logp", "entropy"}:
        sampling = jax.tree.map(lambda x: jnp.broadcast_to(x[..., None], tokens.shape), sampling)
        logp, entropy = log_prob(logits, tokens, sampling)
        found |= {k: x for k, x in {"logp": logp, "entropy": entropy}.items() if k in fields}
    return found


def _chunked(
    function: Callable[..., dict[str, Array]],
    params: PyTree,
    hidden: Array,
    tokens: Array,
    sampling: Sampling,
    vocab: int,
    logits_bytes: int,
) -> dict[str, Array]:
    """`function(params, hidden, tokens, sampling)` over slices of the response axis.

    Slices go through time and keep all rows, so that rows sharded over devices stay where they are.
    """
    *rows, length, width = hidden.shape
    chunks = min(length, math.ceil(4 * math.prod(tokens.shape) * vocab / logits_bytes))
    if chunks <= 1:
        return function(params, hidden, tokens, sampling)
    step = math.ceil(length / chunks)
    chunks = math.ceil(length / step)
    gap = [(0, 0)] * len(rows) + [(0, chunks * step - length)]
    hidden = jnp.pad(hidden, [*gap, (0, 0)]).reshape(*rows, chunks, step, width)
    tokens = jnp.pad(tokens, gap).reshape(*rows, chunks, step)

    @jax.checkpoint
    def body(params: PyTree, x: tuple[Array, Array]) -> dict[str, Array]:
        return function(params, *x, sampling)

    slices = (jnp.moveaxis(hidden, -3, 0), jnp.moveaxis(tokens, -2, 0))
    found = jax.lax.map(functools.partial(body, params), slices)
    return {
        name: jnp.moveaxis(x, 0, len(rows)).reshape(*rows, chunks * step, *x.shape[len(rows) + 2 :])[
            (slice(None),) * len(rows) + (slice(length),)
        ]
        for name, x in found.items()
    }
