"""An algorithm is a value: eight slots, each holding a pure function. Recipes build it, the engine runs it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.filters.basic import everything
from jaxrl_llm.losses.aggregate import token_mean
from jaxrl_llm.losses.ratio import token_ratio
from jaxrl_llm.prompts.basic import as_drawn
from jaxrl_llm.rewards.basic import verified
from jaxrl_llm.types import Batch, Metrics, Scores, Stage, masked
from jaxrl_llm.updates.passes import one_pass
from jaxrl_llm.weights.basic import ones

# What the engine hands to a plain function in each slot.
SLOTS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompts",),
    "rollout": ("world", "key", "prompts"),
    "reward": ("batch",),
    "filter": ("batch",),
    "advantage": ("batch",),
    "weight": ("batch",),
    "loss": ("scores", "batch"),
    "update": ("key", "models", "batch", "learn"),
}

# Whose logits a measure may ask for.
ROLES = ("old", "reference", "teacher", "elsewhere", "lagged", "inner")


@dataclasses.dataclass(frozen=True)
class Chain:
    """Stages run in order, each seeing what the ones before wrote into the slot's field. Made by `chain`."""

    stages: tuple[Callable[..., Any] | Stage, ...]


Slot = Callable[..., Any] | Stage | Chain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """The data flow of one training step, slot by slot. See `SLOTS` for what each function is given.

    prompt: `(Prompts) -> Prompts`: which prompts, in what context.
    rollout: `(World, key, Prompts) -> Rollouts`.
    reward: `(Batch) -> [B G]` or `[B G T]`.
    filter: `(Batch) -> [B G]` bool: rows that count in statistics and loss.
    advantage: `(Batch) -> [B G]` or `[B G T]`: credit. Carries no gradient.
    weight: `(Batch) -> [B G T]`, after credit: numbers multiply the surrogate, booleans select the tokens (`[B G T]`)
        or rows (`[B G]`) that count in the loss, in numerator and denominator. Carries no gradient.
    loss: `(Scores, Batch) -> (scalar, metrics)`, a sum over tokens weighted by `batch.share`.
    update: `(key, models, batch, learn) -> (models, metrics)`, calling `learn(models, batch)` once per optimiser step;
        see `types.Learn` for what else it may do.

    measures: what to compute where the vocabulary is at hand, `{name: function}`; found in `scores.extras[name]` (and
        in those of `batch.old` and `batch.reference`), and computed only if read there. A function of
        `(logits [... V], tokens [...], hidden [... D])` gives `[...]` or `[... n]`. Keyword-only arguments without
        default ask for the logits of a role at the same places: "old" (the policy before the update), "reference" and
        "teacher" (the reference after `rollouts.teacher`) and "lagged" (a copy of the policy that the `update` renews,
        see `updates.lagged`) without gradient, "elsewhere" (the current policy after `rollouts.teacher`) and "inner"
        (the current policy cut off after the layer that the measure's argument `layer` is bound to, without final
        norm) with.

    Each slot takes a plain function, a `Stage` (a function with memory) or a `chain` of them.

    Raises:
      TypeError: a slot holds something that cannot be called with that slot's arguments.
    """

    rollout: Slot
    advantage: Slot
    loss: Slot
    prompt: Slot = as_drawn
    reward: Slot = verified
    filter: Slot = everything
    weight: Slot = ones
    update: Slot = one_pass
    measures: dict[str, Callable[..., Array]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for slot, arguments in SLOTS.items():
            _check(slot, getattr(self, slot), arguments)
        for name, measure in self.measures.items():
            if unknown := sorted(roles_of(measure) - set(ROLES)):
                raise TypeError(
                    f"measure {name!r} has the keyword-only argument {unknown[0]!r}: bind it with functools.partial, "
                    f"or name a role ({', '.join(ROLES)})"
                )
        layer_of(self.measures)


def chain(*stages: Callable[..., Any] | Stage) -> Chain:
    """Runs `stages` in order in one slot.

    Prompts, rewards and advantages pass through (each stage reads and replaces the field), filters are and-ed, weights
    multiplied. Not for `rollout`, `loss` and `update`.
    """
    if not stages:
        raise ValueError("chain() needs at least one stage")
    return Chain(stages)


def roles_of(measure: Callable[..., Array]) -> frozenset[str]:
    """The roles whose logits a measure asks for."""
    return frozenset(
        p.name
        for p in inspect.signature(measure).parameters.values()
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
    )


def layer_of(measures: dict[str, Callable[..., Array]]) -> int | None:
    """The layer whose logits some of the measures ask for.

    Raises:
      TypeError: they do not bind `layer` to one int.
    """
    asking = [inspect.signature(m).parameters for m in measures.values() if "inner" in roles_of(m)]
    layers = {p["layer"].default if "layer" in p else None for p in asking}
    if len(layers) > 1 or not all(isinstance(layer, int) for layer in layers):
        raise TypeError("measures that ask for 'inner' must bind one int: functools.partial(measure, layer=...)")
    return next(iter(layers), None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """`sum_t share_t * (weight_t * surrogate(ratio_t, A_t, l_t) + sum_k term_k,t)` over the batch's mask.

    ratio: `(Scores, Batch) -> [B G T]`: importance ratio of current to old policy.
    surrogate: `(ratio, advantage, logp) -> [B G T]`: the loss of a token, minimised.
    aggregate: `(mask) -> share [B G T]`: how much each token's loss counts; computed over the whole optimiser step,
        so that the loss does not depend on how the step is split over micro-batches or devices.
    terms: each `(Scores, Batch) -> [B G T]`, added per token with the same shares.
    prepare: `(Scores, Batch) -> {name: array}`, handed to the surrogate as keywords: what must be found on the whole
        optimiser step before any token has a loss (quantiles, searched bounds). Scalars, or arrays `[B ...]`. Carries
        no gradient. If it reads the scores and the step is split, they are computed once more for it.
    """

    surrogate: Callable[..., Array]
    ratio: Callable[[Scores, Batch], Array] = token_ratio
    aggregate: Callable[[Array], Array] = token_mean
    terms: tuple[Callable[[Scores, Batch], Array], ...] = ()
    prepare: Callable[[Scores, Batch], dict[str, Array]] | None = None

    def __call__(self, scores: Scores, batch: Batch) -> tuple[Array, Metrics]:
        mask, share = batch.mask, batch.share
        if share is None or batch.advantage is None or scores.logp is None:
            raise ValueError("PolicyLoss needs batch.share, batch.advantage and scores.logp; run it through the engine")
        logp = masked(mask, scores.logp)
        ratio = masked(mask, self.ratio(scores, batch), 1.0)
        advantage = jax.lax.stop_gradient(masked(mask, batch.advantage))
        weight = jnp.ones_like(logp) if batch.weight is None else jax.lax.stop_gradient(masked(mask, batch.weight))

        surrogate = functools.partial(self.surrogate, **jax.lax.stop_gradient(batch.prepared or {}))
        loss = weight * surrogate(ratio, advantage, logp)
        metrics: Metrics = {"ratio": ratio, "clipped": _clipped(surrogate, ratio, advantage, logp)}
        for term in self.terms:
            value = masked(mask, term(scores, batch))
            loss = loss + value
            metrics[f"loss/{_name(term)}"] = value
        return jnp.sum(share * masked(mask, loss)), metrics


def _clipped(surrogate: Callable[..., Array], ratio: Array, advantage: Array, logp: Array) -> Array:
    """Tokens whose advantage is not 0 but whose gradient is: measured on the surrogate, whatever it is."""
    args = jax.lax.stop_gradient((ratio, logp))
    by_ratio, by_logp = jax.grad(lambda r, l: jnp.sum(surrogate(r, advantage, l)), argnums=(0, 1))(*args)
    idle: Array = (by_ratio == 0) & (by_logp == 0) & (advantage != 0)
    return idle


def optional(term: Callable[..., Any], *, weight: Any, **bound: Any) -> tuple[Callable[..., Any], ...]:
    """`(term,)` with its weight bound, or `()` if the weight is None or the number 0: an unused term costs nothing.

    An array (a swept weight) always keeps its term.
    """
    if weight is None or (isinstance(weight, int | float) and weight == 0):
        return ()
    return (functools.partial(term, weight=weight, **bound),)


# --- a recipe as data -------------------------------------------------------------------------------------------------


def numbers(algorithm: Any) -> dict[str, Array]:
    """Every float bound in a recipe, by its path: `{"loss.surrogate.low": 0.2, ...}`.

    Integers and booleans are structure (sizes, switches) and stay in the program; floats and arrays are arguments.
    """
    return {path: jnp.asarray(leaf, jnp.result_type(float)) for path, leaf in _leaves(algorithm) if _is_number(leaf)}


def with_numbers(algorithm: Any, values: dict[str, Any]) -> Any:
    """The same recipe with the numbers at the given paths.

    Raises:
      KeyError: a path the recipe does not have.
    """
    known = numbers(algorithm)
    if unknown := sorted(set(values) - set(known)):
        raise KeyError(f"no number at {unknown[0]!r} in this recipe; it has {', '.join(sorted(known)) or 'none'}")
    return _rebuild(algorithm, values, "")


def describe(algorithm: Any) -> str:
    """The recipe as an expression, defaults left out, one slot a line."""
    lines = []
    for field in dataclasses.fields(Algorithm):
        value = getattr(algorithm, field.name)
        if value is not field.default and not (field.name == "measures" and not value):
            lines.append(f"    {field.name}={show(value)},")
    return "Algorithm(\n" + "\n".join(lines) + "\n)"


def changes(child: Algorithm, parent: Algorithm) -> dict[str, tuple[str, str]]:
    """What `child` changes: `{path: (parent's, child's)}`, down to the argument that differs."""
    return dict(_differences(parent, child, ""))


def _check(slot: str, value: Any, arguments: tuple[str, ...]) -> None:
    if isinstance(value, Chain):
        if slot in ("rollout", "loss", "update"):
            raise TypeError(f"{slot} cannot be a chain: it makes one result")
        for stage in value.stages:
            _check(slot, stage, arguments)
        return
    function, given = (
        (value.apply, ("memory", "key", *(a for a in arguments if a != "key")))
        if isinstance(value, Stage)
        else (value, arguments)
    )
    if not callable(function):
        raise TypeError(f"{slot} needs a function of ({', '.join(arguments)}), got {value!r}")
    try:
        inspect.signature(function).bind(*given)
    except TypeError as error:
        raise TypeError(
            f"{slot} needs a function of ({', '.join(given)}); {_name(function)}{inspect.signature(function)} "
            f"cannot be called so: {error}"
        ) from None


def _children(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of an expression, or None for a leaf."""
    if isinstance(value, functools.partial):
        positional = [(f"[{i}]", x) for i, x in enumerate(value.args)]
        return positional + sorted(value.keywords.items())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, tuple):
        return [(f"[{i}]", x) for i, x in enumerate(value)]
    if isinstance(value, dict):
        return sorted(value.items())
    return None


def _join(path: str, name: str) -> str:
    return f"{path}{name}" if name.startswith("[") or not path else f"{path}.{name}"


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, float | Array) and not isinstance(leaf, bool)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    children = _children(value)
    if children is None:
        yield path, value
    else:
        for name, child in children:
            yield from _leaves(child, _join(path, name))


def _rebuild(value: Any, values: dict[str, Any], path: str) -> Any:
    children = _children(value)
    if children is None:
        return values.get(path, value) if _is_number(value) else value
    new = {name: _rebuild(child, values, _join(path, name)) for name, child in children}
    if isinstance(value, functools.partial):
        args = [new[f"[{i}]"] for i in range(len(value.args))]
        return functools.partial(value.func, *args, **{k: new[k] for k in value.keywords})
    if isinstance(value, dict):
        return new
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else tuple(new.values())
    return dataclasses.replace(value, **new)


def _name(value: Any) -> str:
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__name__", type(value).__name__)


def show(value: Any) -> str:
    """A part of a recipe as an expression."""
    if isinstance(value, functools.partial):
        bound = [show(x) for x in value.args] + [f"{k}={show(x)}" for k, x in value.keywords.items()]
        return f"partial({', '.join([_name(value), *bound])})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        shown = [
            f"{f.name}={show(getattr(value, f.name))}"
            for f in dataclasses.fields(value)
            if getattr(value, f.name) is not f.default
        ]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {show(x)}" for k, x in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + "".join(f"{show(x)}, " for x in value).rstrip() + ")"
    if callable(value):
        return _name(value)
    return repr(value)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, tuple[str, str]]]:
    olds, news = _children(old), _children(new)
    same_head = type(old) is type(new) and (not isinstance(old, functools.partial) or old.func is new.func)
    if olds is None or news is None or not same_head or [n for n, _ in olds] != [n for n, _ in news]:
        before, after = show(old), show(new)
        if before != after:
            yield path, (before, after)
        return
    for (name, a), (_, b) in zip(olds, news, strict=True):
        yield from _differences(a, b, _join(path, name))
