"""Masked and per-id statistics: the numerics every slot shares.

Variances are two-pass (deviations first, then squares), never `E[x^2] - E[x]^2`, and deviations are taken from a value
of the set before its mean is: equal values deviate by exactly 0, whatever their size. `ddof` is what is subtracted
from the count in a variance (1: unbiased). A set of one has deviation 0 and std 0.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.types import masked

Axis = int | tuple[int, ...] | None


class Statistics(NamedTuple):
    """Per id, `[ids]`; `size` is the count. All 0 for an id nobody has."""

    mean: Array
    std: Array
    size: Array


def masked_mean(x: Array, mask: Array, *, axis: Axis = None, keepdims: bool = False) -> Array:
    """The mean of `x` where `mask`; 0 if there is nothing."""
    pivot, count = _pivot(x, mask, axis), _count(mask, axis)
    mean = pivot + jnp.sum(masked(mask, x - pivot), axis, keepdims=True) / jnp.maximum(count, 1)
    return mean if keepdims else jnp.squeeze(mean, axis)


def centered(x: Array, mask: Array, *, axis: Axis = None) -> Array:
    """`x` minus its mean where `mask`, 0 elsewhere; exactly 0 if all values are equal."""
    x = masked(mask, x - _pivot(x, mask, axis))
    return masked(mask, x - jnp.sum(x, axis, keepdims=True) / jnp.maximum(_count(mask, axis), 1))


def masked_var(x: Array, mask: Array, *, ddof: int = 1, axis: Axis = None, keepdims: bool = False) -> Array:
    """The variance of `x` where `mask`, two-pass; 0 for singletons and for nothing."""
    spread = jnp.sum(jnp.square(centered(x, mask, axis=axis)), axis, keepdims=True)
    var = spread / jnp.maximum(_count(mask, axis) - ddof, 1)
    return var if keepdims else jnp.squeeze(var, axis)


def whiten(x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-8, axis: Axis = None) -> Array:
    """`(x - mean) / sqrt(var + eps)` where `mask`, 0 elsewhere."""
    return centered(x, mask, axis=axis) / jnp.sqrt(masked_var(x, mask, ddof=ddof, axis=axis, keepdims=True) + eps)


def standardise(
    x: Array, mask: Array, *, ddof: int = 1, eps: float = 1e-6, raw_singletons: bool = False, axis: Axis = None
) -> Array:
    """`(x - mean) / (std + eps)` where `mask`, 0 elsewhere.

    Args:
      x: any shape.
      mask: bool, the same shape.
      ddof: of the std.
      eps: added to the std, not to the variance.
      raw_singletons: give a set of one its own value (mean 0, std 1) instead of 0.
      axis: what a set is spread over; everything if None.
    """
    std = jnp.sqrt(masked_var(x, mask, ddof=ddof, axis=axis, keepdims=True))
    z = centered(x, mask, axis=axis) / (std + eps)
    return jnp.where(_count(mask, axis) <= 1, masked(mask, x), z) if raw_singletons else z


def segment_statistics(x: Array, ids: Array, mask: Array, *, num_segments: int, ddof: int = 1) -> Statistics:
    """Mean, std and count of `x` per id, over `mask`, for groupings that are not an axis (turns, states, depths).

    Args:
      x: any shape.
      ids: int, the same shape, in `[0, num_segments)` where `mask`.
      mask: bool, the same shape.
      num_segments: how many ids there are, known when tracing.
      ddof: of the std; 0 for an id with at most `ddof` members.
    """
    (pivot, deviation, count), ids = _segments(x, ids, mask, num_segments)
    mean = _per_id(deviation, ids, num_segments) / jnp.maximum(count, 1)
    spread = _per_id(jnp.square(masked(mask.ravel(), deviation - mean[ids])), ids, num_segments)
    std = jnp.sqrt(spread / jnp.maximum(count - ddof, 1))
    return Statistics((pivot + mean)[:-1], std[:-1], count[:-1])


def standardise_segments(
    x: Array,
    ids: Array,
    mask: Array,
    *,
    num_segments: int,
    ddof: int = 1,
    eps: float = 1e-6,
    raw_singletons: bool = False,
) -> Array:
    """`standardise` within each id; shapes as for `segment_statistics`, the result like `x`."""
    return _from_segments(x, ids, mask, num_segments, ddof, eps, raw_singletons, scale=True)


def center_segments(x: Array, ids: Array, mask: Array, *, num_segments: int, raw_singletons: bool = False) -> Array:
    """`x` minus the mean of its id where `mask`, 0 elsewhere."""
    return _from_segments(x, ids, mask, num_segments, 0, 0.0, raw_singletons, scale=False)


def mixed(outcome: Array, keep: Array, *, threshold: float | Array = 0.5) -> Array:
    """`[...]` bool: whether of a group's kept rows some are correct and some are not (DAPO, 2503.14476, eq. 11).

    Args:
      outcome: `[... G]`, the verifier's, not a shaped reward: a length penalty would make every group look mixed.
      keep: `[... G]` bool.
      threshold: correct means above it.
    """
    correct = (keep & (outcome > threshold)).sum(-1)
    return (correct > 0) & (correct < keep.sum(-1))


def masked_quantile(x: Array, mask: Array, q: float | Array) -> Array:
    """The value of nearest rank to `q` (in 0 to 1) where `mask`, `[]`; 0 if there is nothing."""
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf).ravel())
    rank = jnp.round(q * jnp.maximum(mask.sum() - 1, 0)).astype(jnp.int32)
    return masked(mask.any(), ordered[rank])


def largest(x: Array, mask: Array, count: Array) -> Array:
    """Bool, shaped like `x`: the `count` largest values where `mask`; of equal ones the first.

    Args:
      x: any shape.
      mask: bool, the same shape.
      count: `[]` int; all of `mask` if there are fewer, none if it is not positive.
    """
    order = jnp.argsort(jnp.where(mask, -x, jnp.inf).ravel())
    chosen = jnp.zeros(x.size, bool).at[order].set(jnp.arange(x.size) < count)
    return mask & chosen.reshape(x.shape)


def first(index: Array, among: Array | None = None) -> Array:
    """`[B]` bool: whether nobody before (`among [B]`, everybody if None) has the same index."""
    earlier = jnp.tril(index[:, None] == index, k=-1)
    return ~(earlier if among is None else earlier & among).any(-1)


def discounted_sum(x: Array, decay: Array) -> Array:
    """`y_t = x_t + decay_t * y_{t+1}` over the last axis, in logarithmic depth. Shapes `[... T]`."""
    total: Array = jax.lax.associative_scan(_compose, (decay, x), reverse=True, axis=x.ndim - 1)[1]
    return total


def _compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
    (decay_later, x_later), (decay, x) = later, earlier
    return decay * decay_later, x + decay * x_later


def _count(mask: Array, axis: Axis) -> Array:
    return jnp.sum(mask, axis, keepdims=True)


def _pivot(x: Array, mask: Array, axis: Axis) -> Array:
    """A value of the set to measure deviations from. Any would do; the largest does not depend on the order."""
    largest = jnp.max(x, axis, keepdims=True, where=mask, initial=-jnp.inf)
    return jax.lax.stop_gradient(masked(_count(mask, axis) > 0, largest))


def _segments(x: Array, ids: Array, mask: Array, num: int) -> tuple[tuple[Array, Array, Array], Array]:
    """`(pivot [num + 1], deviation from it, count [num + 1]), flat ids`; what is masked out has the id `num`."""
    flat, m = x.ravel(), mask.ravel()
    ids = jnp.where(m, ids.ravel(), num)
    largest = jax.ops.segment_max(masked(m, flat, -jnp.inf), ids, num_segments=num + 1)
    pivot = jax.lax.stop_gradient(masked(jnp.isfinite(largest), largest))
    return (pivot, masked(m, flat - pivot[ids]), _per_id(m.astype(jnp.int32), ids, num)), ids


def _per_id(x: Array, ids: Array, num: int) -> Array:
    return jax.ops.segment_sum(x, ids, num_segments=num + 1)


def _from_segments(
    x: Array, ids: Array, mask: Array, num: int, ddof: int, eps: float | Array, raw_singletons: bool, *, scale: bool
) -> Array:
    (_, deviation, count), flat_ids = _segments(x, ids, mask, num)
    m = mask.ravel()
    mean = _per_id(deviation, flat_ids, num) / jnp.maximum(count, 1)
    z = masked(m, deviation - mean[flat_ids])
    if scale:
        std = jnp.sqrt(_per_id(jnp.square(z), flat_ids, num) / jnp.maximum(count - ddof, 1))
        z = z / (std[flat_ids] + eps)
    if raw_singletons:
        z = jnp.where(count[flat_ids] <= 1, masked(m, x.ravel()), z)
    return z.reshape(x.shape)
