"""The narrow waist: records, stages and learners.

Dimension letters, used in every docstring of the library:

====  =====================================================================
`B`   prompts in a step
`G`   rollouts of one prompt (a group is an axis, ragged groups are a mask)
`T`   response tokens (right-padded)
`S`   prompt tokens (right-padded)
`C`   contexts of one prompt: 1 (shared by the group) or `G` (one per rollout)
`D`   width of the hidden state
`V`   vocabulary
`P`   rows of the data set
`K`   turns
`N`   tree nodes
====  =====================================================================

Records are frozen, keyword-only dataclasses and pytrees of arrays. Every field has exactly one writer, named in
its comment. Response position `t` holds the token chosen *at* `t`; every per-token quantity (log-prob, entropy, value,
advantage) at `t` belongs to that choice, so nothing is ever shifted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any
Memory = Any
Metrics = dict[str, Any]

T = TypeVar("T")


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field,))
def record(cls: type[T]) -> type[T]:
    """A frozen keyword-only dataclass whose fields are pytree children."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


# What a response token is. The order is part of checkpoint and file formats: append, never renumber.
PADDING, POLICY, OBSERVATION, INJECTED, PREFIX = range(5)


@record
class Context:
    """The tokens a response is read after: `[..., S]`, right-padded, at least one real token a row."""

    tokens: Array  # [..., S] int32
    mask: Array  # [..., S] bool, True on real tokens


@record
class Sampling:
    """The distribution tokens are drawn from; arrays, so that changing them compiles nothing.

    `None` leaves a filter out of the program; an array that switches it off (`top_k <= 0`, `top_p >= 1`, `min_p <= 0`)
    keeps it in the program, unexecuted. `temperature == 0` is greedy: the most probable token, whose log-prob is
    reported under temperature 1. Inside `Rollouts` every leaf is `[B G]`.
    """

    temperature: Array | float = 1.0
    top_k: Array | int | None = None
    top_p: Array | float | None = None
    min_p: Array | float | None = None


@record
class Prompts:
    """Written by the task (or the user's data), changed by the `prompt` slot."""

    context: Context  # [B S]
    index: Array  # [B] int32, the row in the data set: what per-prompt memory is indexed by
    target: PyTree  # leading axis B: what the verifier needs; never seen by the policy
    logged: Logged | None = None  # responses that came with the data, if any


@record
class Logged:
    """Responses that come with the data: demonstrations, chosen and rejected answers."""

    tokens: Array  # [B G T] int32
    mask: Array  # [B G T] bool, EOS included
    reward: Array  # [B G] float32; 1 for a demonstration, higher is preferred for pairs


@record
class Samples:
    """What a sampler returns, `[..., T]`, before it is known why it was asked."""

    tokens: Array  # [..., T] int32, right-padded
    mask: Array  # [..., T] bool: tokens the policy chose, EOS included
    logp: Array  # [..., T] float32 under the sampled (tempered, filtered) distribution; 0 where not mask
    entropy: Array  # [..., T] float32, nats, of the sampled distribution; 0 where not mask
    truncated: Array  # [...] bool: ended by length, not by EOS or a stop sequence


@record
class Rollouts:
    """Written by the `rollout` slot."""

    prompts: Prompts  # [B]: the prompts these groups answer (a rollout may drop or repeat some)
    context: Context  # [B C S]: what each row is *scored* under; may differ from what it was sampled under
    tokens: Array  # [B G T] int32
    mask: Array  # [B G T] bool: tokens that statistics and loss may use; EOS included
    role: Array  # [B G T] int8: PADDING, POLICY, OBSERVATION, INJECTED, PREFIX; attended iff not PADDING
    logp: Array  # [B G T] float32: behaviour log-prob of tokens with role POLICY, 0 elsewhere
    entropy: Array  # [B G T] float32: of the behaviour distribution, 0 elsewhere
    version: Array  # [B G T] int32: the step whose parameters chose the token
    truncated: Array  # [B G] bool
    sampling: Sampling  # leaves [B G]: what the log-probs are defined under
    outcome: Array | None = None  # [B G] float32: set by rollouts that asked the verifier; NaN: could not be scored
    generated: Array | None = None  # [B] float32: tokens sampled for a group, its share of discarded ones included
    teacher: Context | None = None  # [B C S]: what the roles "teacher" and "elsewhere" read before the response
    credit: Array | None = None  # [B G T] float32: what a token's segment gained, by rollouts that branch to find out
    valued: Array | None = None  # [B G T] bool: tokens a critic learns from, if they are not those of `mask`
    turn: Array | None = None  # [B G T] int32
    segment: Array | None = None  # [B G T] int32
    node: Array | None = None  # [B G T] int32

    @property
    def attended(self) -> Array:
        """`[B G T]` bool: the tokens that exist."""
        return self.role != PADDING

    @property
    def scored(self) -> Array:
        """`[B G T]` bool: the tokens models are asked about."""
        return self.mask if self.valued is None else self.mask | self.valued

    @property
    def injected(self) -> Array:
        """`[B G]` bool: rows with tokens somebody else wrote (demonstrations)."""
        return (self.role == INJECTED).any(-1)

    @property
    def lengths(self) -> Array:
        """`[B G]` int32: tokens the loss may use."""
        return self.mask.sum(-1)


@record
class Scores:
    """Likelihoods of a batch's responses under one model. A field nobody reads is `None` and was never computed."""

    logp: Array | None = None  # [B G T] float32 under the distribution the rollouts were sampled from; 0 where not mask
    entropy: Array | None = None  # [B G T] float32, nats, of that distribution
    value: Array | None = None  # [B G T] float32, of the state before the token
    extras: dict[str, Array] = dataclasses.field(default_factory=dict)  # [B G T ...] by name


@record
class Batch:
    """A step's data on its way through the slots; a slot sees what the slots before it wrote."""

    rollouts: Rollouts
    step: Array  # [] int32
    outcome: Array  # [B G] float32, by the verifier; 0 where it could not score the row (then `keep` is False)
    old: Scores | None = None  # by the engine if read: the policy's own, recomputed before the update
    reference: Scores | None = None  # by the engine if read
    value: Array | None = None  # [B G T] by the engine if read: the critic before the update
    reward: Array | None = None  # [B G] by `reward` (the sum over tokens, if it returned [B G T])
    token_reward: Array | None = None  # [B G T] by `reward` (at the last token of the row, if it returned [B G])
    keep: Array | None = None  # [B G] bool, by `filter`: rows that count in statistics and loss
    advantage: Array | None = None  # [B G T] by `advantage`
    weight: Array | None = None  # [B G T] by `weight`
    select: Array | None = None  # [B G T] bool, by `weight`: tokens that count in the loss, once credit is given
    prepared: PyTree = None  # by the loss's `prepare`, from the whole optimiser step: scalars, or leading axis B
    share: Array | None = None  # [B G T] by the loss's aggregation: d loss / d (token's loss), sums to 1 for a mean

    @property
    def prompts(self) -> Prompts:
        return self.rollouts.prompts

    @property
    def mask(self) -> Array:
        """`[B G T]` bool: the tokens that count, in rows that are kept. Numerator and denominator use this one."""
        mask = self.rollouts.mask if self.keep is None else self.rollouts.mask & self.keep[..., None]
        return mask if self.select is None else mask & self.select

    @property
    def rows(self) -> Array:
        """`[B G]` bool: kept rows with at least one token."""
        return self.mask.any(-1)


@record
class TrainState:
    """Everything a run needs to go on: what is checkpointed and sharded."""

    step: Array  # [] int32
    key: Array  # typed PRNG key
    params: dict[str, PyTree]  # by role: policy, reference, critic ... (only those the recipe reads); base of adapters
    opt_state: dict[str, PyTree]  # by trained role
    memory: dict[str, Memory]  # by slot
    numbers: dict[str, Array]  # the recipe's numbers, by path: change them between steps without compiling
    sampling: Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What a stage may know when it allocates its memory."""

    rows: int  # P
    prompts: int  # B
    length: int  # T
    vocab: int  # V
    params: dict[str, PyTree]  # of every role, at the start
    example: Any = None  # Prompts of `jax.ShapeDtypeStruct`s: what a step draws
    sampling: Any = None  # Sampling: the run's
    width: int = 0  # D, of the policy's hidden states


def _no_memory(_: Any) -> Memory:
    return ()


@record
class Decoding:
    """What a `Steer` sees before token `t` of each row is chosen."""

    t: Array  # [] int32
    logits: Array  # [B G V] float32 of token t, as the model gives them: neither tempered nor filtered
    tokens: Array  # [B G T] int32, those before t; 0 elsewhere
    mask: Array  # [B G T] bool, those that are there
    alive: Array  # [B G] bool: rows that get another token


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steer:
    """Looks at a batch of rows while they are decoded, lets rows take over what others have, and chooses tokens.

    A row that ended stays as it is, whatever token is named; a row that continues one that ended has ended too. The
    log-prob and the entropy that are recorded are those of the written token under the row's own sampling distribution,
    given its past: what the policy makes of it, not how probable this choice was. That is what a ratio needs; that the
    rows were steered it does not correct. A past that is taken over keeps what was recorded, so that the rows of a
    group should have one sampling distribution.

    init: `((B, G)) -> memory`, a pytree of arrays.
    apply: `(memory, Decoding) -> (memory, source [B G] int32, token [B G] int32)`, before each step: the row of the
        same group whose past (tokens, log-probs, cache) this row continues, itself for its own, -1 for none: such a
        row has no tokens, and gets none before it continues another; and the token it gets next, -1 to draw one.
    """

    apply: Callable[[Memory, Decoding], tuple[Memory, Array, Array]]
    init: Callable[[tuple[int, int]], Memory] = _no_memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """What a `rollout` may do, besides what it is given.

    sample: `(key, Prompts, size, context=None, sampling=None, length=None, limit=None, until=None, own=None,
        within=None, steer=None) -> Rollouts` draws `size` responses a prompt from the current policy. `context`
        (`[B C S]`) replaces the prompts' own tokens, `sampling` the run's; `length` (an int) is `T`; `limit` (`[B G]`)
        is the most tokens of each row, 0 for none; `until(ended [B G] bool) -> bool` stops all rows where they are
        (such rows are `truncated`); `own` (`[B C]`) is how many of a context's last tokens are the beginning of its
        responses; `within` other parameters of the policy and `(their logits [... V]) -> bool [... V]`, the tokens to
        draw from; `steer` a `Steer`.
    score: `(role, Rollouts) -> Scores` of a role in `models`, under `rollouts.context`.
    reward: `(Rollouts) -> [B G]` asks the verifier; NaN where it cannot score.
    models: parameters by role.
    step: `[]` int32.
    length: `T`, the response budget in tokens.
    sampling: the run's.
    """

    sample: Callable[..., Rollouts]
    score: Callable[[str, Rollouts], Scores]
    reward: Callable[[Rollouts], Array]
    models: dict[str, PyTree]
    step: Array
    length: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)


def _forget(memory: Memory, batch: Batch) -> Memory:
    return memory


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a slot holds when it remembers.

    init: `(problem) -> memory`, a pytree of arrays (per-prompt memory has leading axis `P`).
    apply: `(memory, key, *inputs) -> (output, memory)`, `inputs` being what a plain function in that slot is given.
    observe: `(memory, batch) -> memory`, once per step, with everything known.

    A `loss` stage may read its memory in `apply` but changes it in `observe` only: a gradient may run `apply` many
    times a step.
    """

    apply: Callable[..., tuple[Any, Memory]]
    init: Callable[[Problem], Memory] = _no_memory
    observe: Callable[[Memory, Batch], Memory] = _forget


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossStage(Stage):
    """A loss that remembers. `apply(memory, key, scores, batch) -> ((scalar, metrics), memory)`.

    aggregate: as `PolicyLoss.aggregate`.
    prepare: `(memory, scores, batch) -> pytree`, as `PolicyLoss.prepare`; found in `batch.prepared`.
    """

    aggregate: Callable[[Array], Array] | None = None
    prepare: Callable[[Memory, Scores, Batch], PyTree] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learn:
    """What an `update` may do: called, it takes one optimiser step, `(models, batch, loss=None) -> (models, metrics)`.

    `models` is `(parameters by role, optimiser states by trained role)`. `loss` replaces the recipe's: a plain
    `(Scores, Batch) -> (scalar, metrics)` that reads no score the recipe does not.

    step: what a call does.
    objective: `(models, batch, loss=None) -> (trained parameters by role -> (scalar, metrics))`.
    gradient: `(models, batch, loss=None) -> ((scalar, metrics), gradients by trained role)`.
    world: `(models) -> World` with those models, so that an update can sample.
    batch: `(models, Rollouts) -> Batch`: verified and scored by the roles the recipe reads; its slots have not run.
    """

    step: Callable[..., tuple[Any, Metrics]]
    objective: Callable[..., Callable[[dict[str, PyTree]], tuple[Array, Metrics]]]
    gradient: Callable[..., tuple[tuple[Array, Metrics], dict[str, PyTree]]]
    world: Callable[[Any], World]
    batch: Callable[[Any, Rollouts], Batch]

    def __call__(self, models: Any, batch: Batch, loss: Callable[..., Any] | None = None) -> tuple[Any, Metrics]:
        return self.step(models, batch, loss)


class Learner(NamedTuple):
    """All that the outer loop, the checkpointer and the sharding know. Both functions are pure.

    init: `(key) -> TrainState`.
    step: `(state, prompts=None) -> (TrainState, metrics)`; without prompts the task draws them inside the step.
    """

    init: Callable[[Array], TrainState]
    step: Callable[..., tuple[TrainState, Metrics]]
    compiled: bool = True  # False: `step` compiles its own parts and leaves the device between them; do not jit it


def split(key: Array, *names: str) -> dict[str, Array]:
    """One key per name. A function splits the key it was given once and hands each part to one consumer."""
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def masked(mask: Array, x: Array, fill: float = 0.0) -> Array:
    """`x` where `mask`, else `fill`; the gradient at masked places is exactly 0 even where `x` is NaN."""
    return jnp.where(mask, x, jnp.asarray(fill, x.dtype))
