"""What the tokens of a block see: `attend(q, k, v, seen, rule) -> (out, kept)`, for each way a batch is laid out."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from jaxrl_llm.models.attention import Rule, causal, one_token, shared_prefix, write
from jaxrl_llm.models.packing import Packing


def attend_self(q: Array, k: Array, v: Array, seen: Array, rule: Rule) -> tuple[Array, None]:
    """Rows `[M L]` on their own; `seen` is their mask."""
    return causal(q, k, v, seen, rule), None


def attend_keep(q: Array, k: Array, v: Array, seen: Array, rule: Rule) -> tuple[Array, tuple[Array, Array]]:
    """As `attend_self`, keeping keys `[M K d L]` and values `[M K L d]` for `attend_cache`."""
    return causal(q, k, v, seen, rule), (jnp.moveaxis(k, -3, -1), jnp.swapaxes(v, -3, -2))


def attend_group(
    q: Array, k: Array, v: Array, seen: tuple[Array, Array, Array], rule: Rule, *, responses: int
) -> tuple[Array, None]:
    """Prefix tokens attend to themselves, each response to the prefix and itself; `[M, S + R * T, ...]`.

    `seen` is the prefixes' mask `[M S]`, the responses' `own_inputs`, and the position of their input 0, `[M]`.
    """
    m, s = seen[0].shape
    (pq, rq), (pk, rk), (pv, rv) = ((x[:, :s], x[:, s:].reshape(m, responses, -1, *x.shape[2:])) for x in (q, k, v))
    out = _to_prefix_and_self(rq, (pk, pv), (rk, rv), seen, rule)
    return jnp.concatenate([causal(pq, pk, pv, seen[0], rule), out.reshape(m, -1, *q.shape[2:])], axis=1), None


def attend_packed(
    q: Array, k: Array, v: Array, seen: tuple[Array, Array, Array, Packing], rule: Rule
) -> tuple[Array, None]:
    """As `attend_group`, where each shard's prefixes are followed by the packed tokens of its responses."""
    *where, packing = seen
    m, s = where[0].shape
    far = m * s // q.shape[0]
    (pq, rq), (pk, rk), (pv, rv) = (
        (x[:, :far].reshape(m, s, *x.shape[2:]), packing.unpack(x[:, far:])) for x in (q, k, v)
    )
    out = packing.pack(_to_prefix_and_self(rq, (pk, pv), (rk, rv), (where[0], where[1], where[2]), rule))
    prefix = causal(pq, pk, pv, where[0], rule).reshape(q.shape[0], far, *q.shape[2:])
    return jnp.concatenate([prefix, out], axis=1), None


def _to_prefix_and_self(
    q: Array,
    prefix: tuple[Array, Array],
    own: tuple[Array, Array],
    seen: tuple[Array, Array, Array],
    rule: Rule,
) -> Array:
    """`shared_prefix` under a rule."""
    far, near, offset = seen
    s, t = far.shape[-1], jnp.arange(q.shape[2])
    if rule.limits(s + t.size):
        # Prefix key s stands at s, response key t at offset + t.
        far = far[:, None] & rule.near((offset[:, None] + t)[..., None] - jnp.arange(s))
        near &= rule.near(t[:, None] - t)
    return shared_prefix(q, (*prefix, far), (*own, near), rule)


def own_inputs(attended: Array) -> Array:
    """`[M R T T]` bool: which inputs of its own row `[M R T]` an input sees.

    Input t carries token t - 1: it exists if that token does, and the context's last token always does.
    """
    t = attended.shape[-1]
    exists = jnp.concatenate([jnp.ones((*attended.shape[:-1], 1), bool), attended[..., :-1]], axis=-1)
    return jnp.tril(jnp.ones((t, t), bool)) & exists[..., None, :]


def attend_cache(q: Array, k: Array, v: Array, seen: Any, rule: Rule) -> tuple[Array, tuple[Array, Array]]:
    """One new token per response, `[M R H d]`: writes its key and value and attends to the `t` before it and itself."""
    pk, pv, pmask, ck, cv, offset, t, column = seen
    place, lead = jnp.arange(ck.shape[-1]), ck.shape[:-2]
    new_k, new_v = k.reshape(*lead, -1), v.reshape(*lead, -1)
    if column.ndim:
        here = jnp.broadcast_to((place == column[..., None])[:, :, None], (*k.shape[:-1], place.size))
        here = here.reshape(*lead, place.size)
        ck = jnp.where(here[..., None, :], new_k[..., None], ck)
        cv = jnp.where(here[..., None], new_v[..., None, :], cv)
    else:
        ck, cv = write(ck, new_k, column, -1), write(cv, new_v, column, -2)
    return attend_written(q, (pk, pv, pmask), (ck, cv), (offset, t, column), rule), (ck, cv)


def attend_written(q: Array, prefix: Any, cache: tuple[Array, Array], at: Any, rule: Rule) -> Array:
    """Attention of a token that stands in the cache already."""
    (pk, pv, pmask), (ck, cv), (offset, t, column) = prefix, cache, at
    place = jnp.arange(ck.shape[-1])
    age = column[..., None] - place
    age = jnp.where(age < 0, age + place.size, age)  # a remainder, without a division per element
    own = age <= t[..., None]
    if rule.limits(pk.shape[-1] + place.size):
        position = jnp.broadcast_to(offset[:, None] + t, q.shape[:2])
        pmask = pmask[:, None] & rule.near(position[..., None] - jnp.arange(pk.shape[-1]))
        own &= rule.near(age)
    return one_token(q, (pk, pv, pmask), (ck, cv, own), rule)
