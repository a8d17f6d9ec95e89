"""What the engine asks of a policy: text, and the likelihood of text. It need not be autoregressive."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.algorithm import roles_of
from jaxrl_llm.models.heads import hidden_states
from jaxrl_llm.models.model import Adapter, Model, separate_prefixes
from jaxrl_llm.models.packing import Room, of_rollouts, packing, rooms
from jaxrl_llm.rollouts.distribution import log_prob
from jaxrl_llm.rollouts.sampler import sample
from jaxrl_llm.sharding import gathered, placed
from jaxrl_llm.types import PyTree, Rollouts, Samples, Sampling, Scores, masked

T = TypeVar("T")
Head = Callable[[Array], Array]
Extra = Callable[..., Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Everything the engine knows of a policy.

    init: `(key) -> params`.
    sample: `(params, keys [B G], context: Context [B C S], sampling, *, length, eos, stop, limit, until, own,
        within, steer) -> Samples [B G T]`.
    score: `(params, rollouts, fields, heads={}, measures={}, others={}, room=None) -> Scores`: the requested fields of
        the responses under `rollouts.context` and `rollouts.sampling`; see `score`.
    hidden: `(params, rollouts) -> [B G T D]`: what `score` takes for the other roles; with the keyword `layer` that of
        an inner layer.
    width: `D`.
    adapter: of a policy that trains adapters on a frozen base. A run's state then holds the base once, as
        `params["base"]`, and adapters for every role; `whole` makes of both what the functions above take.
    sizes: in how many sizes `score` is compiled; see `language_model`.
    """

    vocab: int
    init: Callable[[Array], PyTree]
    sample: Callable[..., Samples]
    score: Callable[..., Scores]
    hidden: Callable[..., Array]
    width: int = 0
    adapter: Adapter | None = None
    sizes: int = 1

    def whole(self, params: Mapping[str, PyTree], role: PyTree | str = "policy") -> PyTree:
        """A role's parameters as `sample`, `score`, `hidden` and an evaluator take them.

        Args:
          params: by role, as `state.params`.
          role: its name, or parameters in its place.
        """
        own = params[role] if isinstance(role, str) else role
        return own if self.adapter is None else self.adapter.join(params["base"], own)

    def fitted(self, function: Callable[[Room | None], T], rollouts: Rollouts, shards: int = 1) -> T:
        """`function(room)` of the smallest room that holds the rollouts' tokens; it is compiled for each.

        A gradient is taken within `function`, not of the result: else what all sizes keep for it is kept.
        """
        if self.sizes == 1:
            return function(None)
        found, index = rooms(rollouts, self.sizes, shards)
        result: T = jax.lax.switch(index, [functools.partial(function, room) for room in found])
        return result


def language_model(
    model: Model, *, slots: int | None = None, logits_bytes: int = 2**30, share_prefix: bool = True, sizes: int = 1
) -> Policy:
    """An autoregressive policy.

    Args:
      model: the network.
      slots: rows that decode at once, refilled as they finish; `None` decodes all rows together.
      logits_bytes: scores whose float32 logits take more are computed in chunks of about this many bytes of logits (a
          gradient holds a few arrays of that size), and each chunk's logits a second time for the gradient.
      share_prefix: scores encode a context once for all rows that share it (Prefix Grouper, 2506.05433); `False`: once
          for each row. Changes cost, not the result. A critic with a trunk of its own is told by its own model:
          `critic(separate_prefixes(model))`.
      sizes: with more than 1, what is scored and learned from is packed: padding is computed only up to the next of
          so many sizes, each compiled. Changes cost, not the result. Pays where responses are much shorter than the
          longest; under `vmap` all sizes are computed. Critics with a trunk of their own, and the hidden states of
          other roles that measures ask for, are not packed.

    Raises:
      ValueError: packing of a model, or of a layout, that cannot be packed.
    """
    if sizes < 1:
        raise ValueError(f"sizes must be at least 1, got {sizes}")
    if sizes > 1 and (model.packed is None or not share_prefix):
        raise ValueError("packing (sizes > 1) needs a model with Model.packed, and share_prefix=True")
    model = placed(model)
    scored = model if share_prefix else separate_prefixes(model)
    return Policy(
        vocab=model.vocab,
        init=model.init,
        sample=functools.partial(generate, model, slots=slots),
        score=functools.partial(score, scored, logits_bytes=logits_bytes),
        hidden=functools.partial(hidden_states, scored),
        width=model.width,
        adapter=model.adapter,
        sizes=sizes,
    )


def generate(model: Model, params: PyTree, *args: Any, **options: Any) -> Samples:
    """`rollouts.sampler.sample`; what every token needs of weights that are split over devices is fetched once."""
    return sample(model, gathered(params, but="layers"), *args, **options)


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
    measures: Mapping[str, Extra] | None = None,
    others: Mapping[str, tuple[PyTree, Array]] | None = None,
    *,
    room: Room | None = None,
    logits_bytes: int = 2**30,
) -> Scores:
    """Scores of the responses under `rollouts.context`: one forward pass, and logits only for fields that need them.

    Args:
      fields: of "logp", "entropy", names in `EXTRAS` and `measures`, and names in `heads`.
      heads: `(hidden [B G T D]) -> [B G T ...]` by field; all but "value" land in `extras`.
      measures: more `EXTRAS`, see `Algorithm.measures`.
      others: parameters and hidden states `[B G T D]` of the roles that measures ask for; what has a gradient keeps it.
      room: only this many tokens are computed; `packing.rooms` says how many there must be.
      logits_bytes: see `language_model`.

    Returns:
      the requested fields, 0 where not `rollouts.scored`, whatever stands there.

    Raises:
      ValueError: a field nobody can compute, or contexts that do not divide the group.
    """
    heads, extras = heads or {}, EXTRAS | dict(measures or {})
    if unknown := sorted(fields - {"logp", "entropy", *extras, *heads}):
        known = ", ".join(["logp", "entropy", *extras, *heads])
        raise ValueError(f"no score named {unknown[0]!r}; this policy has {known} (a 'value' needs a critic's head)")
    if not fields:
        return Scores()
    mask = rollouts.scored
    tokens = jnp.where(mask, rollouts.tokens, 0)
    per_token = jax.tree.map(lambda x: jnp.broadcast_to(x[..., None], mask.shape), rollouts.sampling)
    p = None if room is None else packing(of_rollouts(rollouts), room)
    shape = mask.shape if p is None else p.needed.shape

    def pack(x: Array) -> Array:
        return x if p is None else p.pack(x.reshape(*shape, *x.shape[3:]))

    def unpack(x: Array) -> Array:
        return x if p is None else p.unpack(x).reshape(*mask.shape, *x.shape[2:])

    # Zero where nobody may look, so that neither a value nor a gradient of such a place can reach the result.
    read = pack(mask)[..., None]
    hidden = masked(read, hidden_states(model, params, rollouts, packing=p))
    found = {name: heads[name](hidden) for name in fields & set(heads)}
    if of_logits := fields - set(heads):
        wanted = {name: extras[name] for name in of_logits & set(extras)}
        chunk = functools.partial(_of_logits, model, of_logits - set(extras), wanted)
        others = {role: (w, masked(read, pack(h))) for role, (w, h) in (others or {}).items()}
        weights = {role: w for role, (w, _) in others.items()}
        seen = {role: h for role, (_, h) in others.items()}
        each = ((hidden, seen), pack(tokens), jax.tree.map(pack, per_token))
        found |= _chunked(chunk, (params, weights), each, model.vocab * (1 + len(others)), logits_bytes)
    found = {name: unpack(x) for name, x in found.items()}
    found = {k: masked(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x) for k, x in found.items()}
    named = {name: found.pop(name) for name in ("logp", "entropy", "value") if name in found}
    return Scores(**named, extras=found)


def _of_logits(
    model: Model,
    fields: frozenset[str],
    measures: Mapping[str, Extra],
    params: tuple[PyTree, dict[str, PyTree]],
    hidden: tuple[Array, dict[str, Array]],
    tokens: Array,
    sampling: Sampling,
) -> dict[str, Array]:
    logits = model.logits(params[0], hidden[0])
    others = {role: model.logits(params[1][role], h) for role, h in hidden[1].items()}
    found = {}
    for name, measure in measures.items():
        found[name] = measure(logits, tokens, hidden[0], **{role: others[role] for role in roles_of(measure)})
    if fields:
        logp, entropy = log_prob(logits, tokens, sampling)
        found |= {k: x for k, x in {"logp": logp, "entropy": entropy}.items() if k in fields}
    return found


def _chunked(
    function: Callable[..., dict[str, Array]], params: PyTree, each: PyTree, vocab: int, logits_bytes: int
) -> dict[str, Array]:
    """`function(params, *each)` over slices of the last token axis; `each` is `(hidden, tokens [... T], sampling)`.

    Slices go through time and keep all rows, so that rows sharded over devices stay where they are.
    """
    *rows, length = each[1].shape
    chunks = min(length, math.ceil(4 * math.prod((*rows, length)) * vocab / logits_bytes))
    if chunks <= 1:
        return function(params, *each)
    step = math.ceil(length / chunks)
    chunks = math.ceil(length / step)

    def cut(x: Array) -> Array:
        gap = [(0, 0)] * len(rows) + [(0, chunks * step - length)] + [(0, 0)] * (x.ndim - len(rows) - 1)
        x = jnp.pad(x, gap)
        return jnp.moveaxis(x.reshape(*rows, chunks, step, *x.shape[len(rows) + 1 :]), len(rows), 0)

    @jax.checkpoint
    def body(params: PyTree, x: PyTree) -> dict[str, Array]:
        return function(params, *x)

    found = jax.lax.map(functools.partial(body, params), jax.tree.map(cut, each))
    return {
        name: jnp.moveaxis(x, 0, len(rows)).reshape(*rows, chunks * step, *x.shape[len(rows) + 2 :])[
            (slice(None),) * len(rows) + (slice(length),)
        ]
        for name, x in found.items()
    }
