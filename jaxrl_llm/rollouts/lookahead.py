"""Groups that fork where the policy is unsure, look ahead, and drop the branches that come to the same (LATR)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxrl_llm.rollouts.ending import anywhere
from jaxrl_llm.rollouts.rows import take_rows
from jaxrl_llm.types import Decoding, Prompts, Rollouts, Steer, World, record

Alike = Callable[[Array, Array, Array], Array]
Share = Callable[[Array], Array]


@record
class Branches:
    """Who stands in the G places of a group."""

    parent: Array  # [G] int32: the place of the row it left; its own for the first row, which never leaves place 0
    serial: Array  # [G] int32: in the order of birth, `G * birth + 1 + rank`; 0 for the first row, -1 for nobody

    @property
    def here(self) -> Array:
        return self.serial >= 0

    @property
    def birth(self) -> Array:
        """`[G]` int32: the position of a branch's first own token."""
        return self.serial // self.serial.shape[-1]


@record
class Lookahead:
    """What a batch of growing groups remembers."""

    branches: Branches  # [B G]
    over: Array  # [] bool: all rows are sampled from now on


def edit_distance(a: Array, b: Array, length: Array) -> Array:
    """Levenshtein's distance of the first `length` tokens of `a` and of `b` `[R]`, int32."""
    j = jnp.arange(a.size + 1)

    def row(above: Array, x: Array) -> Array:
        best = jnp.concatenate([above[:1] + 1, jnp.minimum(above[1:] + 1, above[:-1] + (b != x))])
        return lax.cummin(best - j) + j

    return _table(row, j, a)[length, length]


def common_subsequence(a: Array, b: Array, length: Array) -> Array:
    """Length of the longest common subsequence of the first `length` tokens of `a` and of `b` `[R]`, int32."""

    def row(above: Array, x: Array) -> Array:
        return lax.cummax(above.at[1:].max(above[:-1] + (b == x)))

    return _table(row, jnp.zeros(a.size + 1, jnp.int32), a)[length, length]


def repeated_suffix(a: Array, b: Array, length: Array) -> Array:
    """Length of the longest suffix of one text that stands anywhere in the other, of the first `length` of `[R]`."""

    def row(above: Array, x: Array) -> Array:
        return jnp.zeros_like(above).at[1:].set(jnp.where(b == x, above[:-1] + 1, 0))

    common = _table(row, jnp.zeros(a.size + 1, jnp.int32), a)  # the suffixes that a[:i] and b[:j] have in common
    return jnp.where(jnp.arange(a.size + 1) <= length, jnp.maximum(common[length], common[:, length]), 0).max()


def _table(row: Callable[[Array, Array], Array], first: Array, a: Array) -> Array:
    """The rows of a dynamic programme, `[R + 1 R + 1]`: `row(row above, token of a)`."""

    def body(above: Array, x: Array) -> tuple[Array, Array]:
        now = row(above, x)
        return now, now

    return jnp.concatenate([first[None], lax.scan(body, first, a)[1]])


def few_edits(a: Array, b: Array, length: Array, *, below: float | Array) -> Array:
    """Whether the edit distance over the length is below `below`."""
    return edit_distance(a, b, length) / length < below


def overlapping(a: Array, b: Array, length: Array, *, suffix: float | Array, rouge: float | Array) -> Array:
    """Whether a repeated suffix takes more than `suffix` of the length, or ROUGE-L is above `rouge`.

    ROUGE-L of texts of equal length is the part that their longest common subsequence has of it.
    """
    ends = repeated_suffix(a, b, length) / length > suffix
    return ends | (common_subsequence(a, b, length) / length > rouge)


def pruned(
    branches: Branches, tokens: Array, alive: Array, t: Array, *, windows: tuple[int, ...], alike: Alike
) -> Array:
    """`[G]` bool: branches whose last tokens are like their parent's, and what grew on them.

    Only branches of an age in `windows` are compared, over all tokens since they left, and only if both go on.

    Args:
      branches: of a group.
      tokens: `[G T]`.
      alive: `[G]` bool.
      t: tokens so far.
      windows: ages.
      alike: `(own [R], parent's [R], length) -> bool`.
    """
    due = due_for_comparison(branches, alive, t, windows)

    def compared() -> Array:
        place = jnp.clip(branches.birth[:, None] + jnp.arange(max(windows)), 0, tokens.shape[-1] - 1)
        own = jnp.take_along_axis(tokens, place, -1)
        other = jnp.take_along_axis(tokens[branches.parent], place, -1)
        return due & jax.vmap(alike)(own, other, jnp.where(due, t - branches.birth, 1))

    gone: Array = lax.cond(anywhere(due), compared, lambda: due)
    for _ in range(due.size - 2):  # the longest line of branches of branches
        gone = gone | gone[branches.parent]
    return gone


def due_for_comparison(branches: Branches, alive: Array, t: Array, windows: tuple[int, ...]) -> Array:
    """`[G]` bool: branches whose age is in `windows` and that go on, as their parents do."""
    aged = jnp.isin(t - branches.birth, jnp.array(windows, jnp.int32))
    return aged & (branches.serial > 0) & alive & alive[branches.parent]


def forked(
    branches: Branches,
    first: Array,
    second: Array,
    alive: Array,
    t: Array,
    *,
    capacity: Array,
    absolute: float | Array,
    relative: float | Array,
) -> tuple[Branches, Array]:
    """The branches after token `t` is chosen, and `[G]` bool which of them are new.

    A row forks where its second token is likely and nearly as likely as its first. If there is no place for all, the
    oldest rows go first.

    Args:
      branches: of a group.
      first: `[G]` probability of each row's most probable token.
      second: `[G]` of the next one.
      alive: `[G]` bool.
      t: tokens so far.
      capacity: the most rows of the group.
      absolute: what `second` must exceed.
      relative: what `first - second` must stay below.
    """
    size = branches.serial.size
    unsure = branches.here & alive & (second > absolute) & (first - second < relative)
    rank = jnp.sum(unsure & (branches.serial < branches.serial[:, None]), -1)
    free = ~branches.here & (jnp.arange(size) < capacity)
    turn = jnp.cumsum(free) - 1
    match = free[:, None] & unsure & (rank == turn[:, None])  # [place row]
    new = match.any(-1)
    parent = jnp.where(new, jnp.argmax(match, -1), branches.parent)
    return Branches(parent=parent, serial=jnp.where(new, size * t + 1 + turn, branches.serial)), new


def enough(
    branches: Branches,
    alive: Array,
    t: Array,
    *,
    capacity: Array,
    length: int,
    longest: int,
    full: float | Array,
    decay: float | Array,
) -> Array:
    """Whether the places of all groups `[B G]` are all but taken, and no branch is still to be compared.

    A group all of whose rows have ended counts as full.

    Args:
      branches: leaves `[B G]`.
      alive: `[B G]` bool.
      t: tokens so far.
      capacity: the most rows of a group.
      length: the most tokens of a row.
      longest: the oldest age at which a branch is compared.
      full: the part of the places that must be taken at the start.
      decay: how much less at the end.
    """
    last = t - 1
    taken = jnp.where((branches.here & alive).any(-1), branches.here.sum(-1), capacity).sum()
    wanted = jnp.round(capacity * alive.shape[0] * (full - decay * last / length))
    return (taken >= wanted) & ~(branches.here & (branches.birth + longest >= last)).any()


def look_ahead(
    memory: Lookahead,
    seen: Decoding,
    *,
    capacity: Array,
    absolute: float | Array,
    relative: float | Array,
    windows: tuple[int, ...],
    alike: Alike,
    full: float | Array,
    decay: float | Array,
    force: int,
) -> tuple[Lookahead, Array, Array]:
    """`Steer.apply`: rows go on with their most probable tokens and fork; then all are sampled, the rest from copies.

    See `sample_lookahead`.
    """
    t, alive = seen.t, seen.alive
    own = jnp.broadcast_to(jnp.arange(alive.shape[1]), alive.shape)
    prune = functools.partial(pruned, t=t, windows=windows, alike=alike)
    done = functools.partial(enough, capacity=capacity, longest=max(windows), full=full, decay=decay)
    fork = functools.partial(forked, t=t, capacity=capacity, absolute=absolute, relative=relative)

    def look() -> tuple[Lookahead, Array, Array]:
        gone = jax.vmap(prune)(memory.branches, seen.tokens, alive)
        left = dataclasses.replace(memory.branches, serial=jnp.where(gone, -1, memory.branches.serial))
        over = done(left, alive, t, length=seen.tokens.shape[-1]) | (t >= force)
        p, best = lax.top_k(jax.nn.softmax(seen.logits, -1), 2)
        grown, new = jax.vmap(fork)(left, p[..., 0], p[..., 1], alive)
        second = jnp.take_along_axis(best[..., 1], grown.parent, -1)
        # At first all rows are about to begin: those that nobody is yet must not.
        none = ~grown.here & (own < capacity) & (gone | (t == 0))
        source = jnp.where(new, grown.parent, jnp.where(none, -1, own))
        token = jnp.where(new, second, jnp.where(grown.here, best[..., 0], -1))
        copied = jnp.where(~left.here & (own < capacity), 0, own)
        return (
            Lookahead(branches=jax.tree.map(lambda a, b: jnp.where(over, a, b), left, grown), over=over),
            jnp.where(over, copied, source),
            jnp.where(over, -1, token),
        )

    steered: tuple[Lookahead, Array, Array]
    steered = lax.cond(memory.over, lambda: (memory, own, jnp.full_like(own, -1)), look)
    return steered


def rooted(shape: tuple[int, int], *, capacity: Array) -> Lookahead:
    """`Steer.init`: each group is its first row; without capacity it is nobody."""
    place = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    serial = jnp.where((place == 0) & (capacity > 0), 0, -1)
    return Lookahead(branches=Branches(parent=jnp.zeros_like(place), serial=serial), over=jnp.array(False))


def stepwise(step: Array, *, at: tuple[int, ...], values: tuple[float, ...]) -> Array:
    """The value of the last of the steps `at` that is not after `step`, `[]`."""
    last = jnp.searchsorted(jnp.array(at), step, side="right") - 1
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in values])[jnp.maximum(last, 0)]


def sample_lookahead(
    world: World,
    key: Array,
    prompts: Prompts,
    *,
    size: int,
    share: Share,
    absolute: float | Array,
    relative: float | Array,
    windows: tuple[int, ...],
    alike: Alike,
    force: int,
    full: float | Array,
    decay: float | Array,
) -> Rollouts:
    """Groups of `size`: `size * share(step)` rows that are grown as a tree, the rest independent samples.

    The tree starts as one row. Each row takes its most probable token; where the next one is nearly as probable, a new
    row takes that. Branches that have come to the same as the row they left are dropped with all that grew on them.
    Once the trees are full, or after `force` tokens, all rows are sampled; places that are free hold copies of the
    tree's first row.

    Args:
      world: samples.
      key: consumed.
      prompts: `[B]`.
      size: rows of a group.
      share: `(step) -> []`, the part of the rows that is grown.
      absolute: see `forked`; probabilities are those at temperature 1, without filters.
      relative: see `forked`.
      windows: see `pruned`.
      alike: see `pruned`.
      force: the most tokens before rows are sampled.
      full: see `enough`.
      decay: see `enough`.
    """
    capacity = jnp.round(size * share(world.step)).astype(jnp.int32)
    rule = functools.partial(look_ahead, absolute=absolute, relative=relative, windows=windows, alike=alike)
    steer = Steer(
        init=functools.partial(rooted, capacity=capacity),
        apply=functools.partial(rule, capacity=capacity, full=full, decay=decay, force=force),
    )
    rows = world.sample(key, prompts, size, steer=steer)
    # All trees may have ended before they were full.
    empty = ~rows.mask.any(-1) & (jnp.arange(size) < capacity)
    return take_rows(rows, jnp.where(empty, 0, jnp.arange(size)))
