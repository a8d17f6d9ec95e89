"""The distribution tokens are drawn from: one definition for the sampler and for the trainer.

Temperature first, then top-k, then top-p on what top-k left, then min-p. Each of the three filters keeps the tokens
whose logit reaches a threshold, so a support is one number a row: `y >= low` with `y = logit / temperature - max`.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrl_llm.types import Sampling

FAR = -1e30  # the logit of a filtered token: finite, so that 0 * FAR is 0
BLOCK = 128  # tokens summed together before the inverse CDF looks for the block


def filtered(logits: Array, sampling: Sampling) -> Array:
    """Logits of the sampled distribution.

    Ties at a threshold are kept. `top_p` keeps the smallest set of most probable tokens whose mass reaches it (nucleus
    sampling, 1904.09751), renormalised after `top_k`; `min_p` keeps tokens at least that fraction as probable as the
    most probable one (2407.01082).

    Args:
      logits: `[..., V]`.
      sampling: leaves broadcastable to `[...]`; no gradient flows through the choice of the support.

    Returns:
      `[..., V]` float32, `FAR` where filtered out; at temperature 0 those of temperature 1.
    """
    z = _tempered(logits, sampling)
    y = _relative(z)
    low = _threshold(y, sampling)
    return z if low is None else jnp.where(y >= low, z, FAR)


def log_prob(logits: Array, tokens: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Log-probability of tokens, and entropy, under the sampled distribution.

    A given token always counts as part of the support: a token that was sampled keeps a finite log-prob when the
    parameters change.

    Args:
      logits: `[..., V]`.
      tokens: `[...]` int.
      sampling: leaves broadcastable to `[...]`.

    Returns:
      log-prob and entropy, each `[...]` float32, nats.
    """
    y = _relative(_tempered(logits, sampling))
    return _statistics(y, tokens, _threshold(y, sampling))


def choose(key: Array, logits: Array, sampling: Sampling) -> Array:
    """One token a row, `[...]` int32, by inverting the distribution function at one uniform number.

    Args:
      key: `[...]` typed keys, one a row.
      logits: `[..., V]`.
      sampling: leaves broadcastable to `[...]`; temperature 0 takes the most probable token (the first of ties).
    """
    return draw(uniform(key), logits, sampling)[0]


def draw(number: Array, logits: Array, sampling: Sampling, given: Array | None = None) -> tuple[Array, Array, Array]:
    """A token and what is known of it: `choose` and `log_prob` in one pass over the logits.

    Args:
      number: `[...]` float32 in [0, 1), see `uniform`.
      logits: `[..., V]`.
      sampling: leaves broadcastable to `[...]`.
      given: `[...]` int32, tokens to take instead of drawing them; below 0 where there is none.

    Returns:
      token `[...]` int32, its log-prob and the distribution's entropy `[...]` float32.
    """
    y = _relative(_tempered(logits, sampling))
    low = _threshold(y, sampling)
    # The most probable token is the first one of a distribution over the maximum alone.
    greedy = jnp.broadcast_to(jnp.asarray(sampling.temperature) == 0, number.shape)
    lowest = jnp.where(greedy[..., None], 0.0, FAR if low is None else low)
    token = _invert(jnp.where(greedy, 0.0, number), y, lowest)
    if given is not None:
        token = jnp.where(given < 0, token, given)
    return (token, *_statistics(y, token, low))


def uniform(key: Array) -> Array:
    """`[...]` float32 multiples of 2^-24 in [0, 1), one for each typed key `[...]`."""
    draws = jax.random.bits
    for _ in range(key.ndim):
        draws = jax.vmap(draws)
    return (draws(key) >> 8).astype(jnp.float32) * 2.0**-24


def _tempered(logits: Array, sampling: Sampling) -> Array:
    temperature = jnp.asarray(sampling.temperature, jnp.float32)[..., None]
    z = logits.astype(jnp.float32) / jnp.where(temperature == 0, 1.0, temperature)
    return jnp.maximum(z, FAR)


def _relative(z: Array) -> Array:
    return z - lax.stop_gradient(z.max(-1, keepdims=True))


def _statistics(y: Array, tokens: Array, low: Array | None) -> tuple[Array, Array]:
    here = jnp.arange(y.shape[-1]) == tokens[..., None]
    keep = None if low is None else (y >= low) | here
    kept = y if keep is None else jnp.where(keep, y, FAR)
    p = jnp.exp(kept)
    total = p.sum(-1)
    log_total = jnp.log(total)
    mean = (p * kept).sum(-1) / total
    return jnp.where(here, y, 0.0).sum(-1) - log_total, log_total - mean


def _threshold(y: Array, sampling: Sampling) -> Array | None:
    """The lowest kept value of `y` (`[..., V]`, at most 0): `[..., 1]`, or None if every filter is absent."""
    if sampling.top_k is None and sampling.top_p is None and sampling.min_p is None:
        return None
    y = lax.stop_gradient(y)
    low = jnp.full((*y.shape[:-1], 1), FAR)
    if sampling.top_k is not None:
        top_k = jnp.broadcast_to(jnp.asarray(sampling.top_k)[..., None], low.shape)
        low = lax.cond(jnp.any(top_k > 0), _at_top_k, _unfiltered, y, low, top_k)
    if sampling.top_p is not None:
        top_p = jnp.broadcast_to(jnp.asarray(sampling.top_p, jnp.float32)[..., None], low.shape)
        low = lax.cond(jnp.any(top_p < 1), _at_top_p, _unfiltered, y, low, top_p)
    if sampling.min_p is not None:
        min_p = jnp.asarray(sampling.min_p, jnp.float32)[..., None]
        low = jnp.maximum(low, jnp.log(jnp.clip(min_p, 0.0, 1.0)))
    return lax.stop_gradient(low)


def _unfiltered(y: Array, low: Array, limit: Array) -> Array:
    return low


def _at_top_k(y: Array, low: Array, top_k: Array) -> Array:
    on = top_k > 0
    found = _search(y, None, low, jnp.minimum(top_k, y.shape[-1]), on)
    return jnp.where(on, found, low)


def _at_top_p(y: Array, low: Array, top_p: Array) -> Array:
    on = top_p < 1
    p = jnp.where(y >= low, jnp.exp(y), 0.0)
    found = _search(y, p, low, jnp.maximum(top_p, 0.0) * p.sum(-1, keepdims=True), on)
    return jnp.where(on, found, low)


def _search(y: Array, weight: Array | None, low: Array, target: Array, on: Array) -> Array:
    """The highest threshold at which the `weight` (None: the number) of tokens with `y >= threshold` reaches `target`.

    Bisection over the float32 numbers between `low` and 0 in their own order: exact, and cheaper than a sort. It ends
    as soon as one token is left between the two ends; rows that are not `on` end at once.
    """
    lower = _order(jnp.maximum(low, y.min(-1, keepdims=True)))
    upper = jnp.where(on, 1, lower)
    count = functools.partial(jnp.sum, axis=-1, keepdims=True, dtype=jnp.int32)

    Ends = tuple[Array, Array, Array, Array]

    def undecided(ends: Ends) -> Array:
        lower, upper, at_lower, at_upper = ends
        return jnp.any((upper - lower > 1) & (at_lower - at_upper > 1))

    def halve(ends: Ends) -> Ends:
        lower, upper, at_lower, at_upper = ends
        middle = lower + (upper - lower) // 2
        inside = y >= _number(middle)
        n = count(inside)
        reached = (n if weight is None else jnp.where(inside, weight, 0.0).sum(-1, keepdims=True)) >= target
        return (
            jnp.where(reached, middle, lower),
            jnp.where(reached, upper, middle),
            jnp.where(reached, n, at_lower),
            jnp.where(reached, at_upper, n),
        )

    start = lower, upper, jnp.full_like(lower, y.shape[-1]), jnp.zeros_like(lower)
    return _number(lax.while_loop(undecided, halve, start)[0])


def _order(x: Array) -> Array:
    """Numbers at most 0 as int32 in the same order."""
    return -lax.bitcast_convert_type(jnp.abs(x), jnp.int32)


def _number(order: Array) -> Array:
    return -lax.bitcast_convert_type(-order, jnp.float32)


def _invert(number: Array, y: Array, low: Array) -> Array:
    """The first token at which the cumulative probability exceeds `number`: first its block, then inside it."""
    vocab = y.shape[-1]
    blocks = -(-vocab // BLOCK)
    p = jnp.where(y >= low, jnp.exp(y), 0.0)
    p = jnp.pad(p, [(0, 0)] * (y.ndim - 1) + [(0, blocks * BLOCK - vocab)]).reshape(*number.shape, blocks, BLOCK)
    sums = p.sum(-1)
    block, rest = _first_above(sums, number * sums.sum(-1))
    inside = jnp.take_along_axis(p, block[..., None, None], axis=-2)[..., 0, :]
    return block * BLOCK + _first_above(inside, rest)[0]


def _first_above(p: Array, number: Array) -> tuple[Array, Array]:
    """The first index with `p > 0` whose cumulative sum exceeds `number`, else the last with `p > 0`; the remainder.

    A sum taken in another order may round `number` up to the total, or let the cumulative sum grow at an index of
    probability 0: neither may choose a token outside the support.
    """
    n = p.shape[-1]
    index = jnp.arange(n)
    # A product with a triangle: cumsum takes n^2 / 2 additions that do not vectorise on a CPU.
    triangle = (index[:, None] <= index).astype(p.dtype)
    cumulative = jnp.dot(p, triangle, precision=lax.Precision.HIGHEST)
    rank = jnp.where(p > 0, jnp.where(cumulative > number[..., None], 2 * n - index, index), -1).max(-1)
    chosen = jnp.where(rank > n, 2 * n - rank, jnp.maximum(rank, 0))
    before = jnp.where(index < chosen[..., None], p, 0.0).sum(-1)
    return chosen, jnp.maximum(number - before, 0.0)
