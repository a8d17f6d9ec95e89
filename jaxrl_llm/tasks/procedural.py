"""Tasks whose problems are drawn and verified inside the graph.

A family writes functions of one problem; this file makes them a `Task`: batches, the two splits, the row id.

A problem is held out if the top three bits of its fingerprint are 0 (one in eight); draws for training are repeated
until the problem is not held out, draws for the test set until it is: the splits cannot share a problem.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrl_llm.tasks.characters import Piece, character_tokenizer, text_of
from jaxrl_llm.tasks.task import Task
from jaxrl_llm.types import Context, Logged, Prompts, PyTree


def procedural_task(
    *,
    name: str,
    rows: int,
    prompt_length: int,
    response_length: int,
    words: int,
    propose: Callable[[Array], PyTree],
    fingerprint: Callable[[PyTree], Array],
    render: Callable[[PyTree], Piece],
    judge: Callable[[PyTree, Array, Array], Array],
    solve: Callable[[Array, PyTree], tuple[Piece, Piece]],
    grade: Callable[..., list[float | None]],
    columns: Callable[[Prompts], dict[str, list[Any]]],
) -> Task:
    """A task from functions of one problem.

    Args:
      rows: size of the id space problems are hashed into for `Prompts.index`.
      words: uint32 words of noise that make a problem. One draw of all of them compiles much faster than several.
      propose: `(noise [words]) -> problem`, a pytree of arrays, from both splits.
      fingerprint: `(problem) -> []` uint32, equal for problems that must not be split.
      render: `(problem) -> (tokens [S], mask [S])`, right-padded.
      judge: `(problem, tokens [T], length []) -> []`, the score of a response's text (`characters.text_of`).
      solve: `(noise [], problem) -> ((tokens [T], mask [T]), (tokens, mask))`: a right and a wrong response, EOS
        included.
      grade, columns: as in `Task`.
    """
    draw = functools.partial(_draw, words, propose, fingerprint, render, rows)
    return Task(
        name=name,
        tokenizer=character_tokenizer(),
        rows=rows,
        prompt_length=prompt_length,
        response_length=response_length,
        test=functools.partial(_test, jax.jit(functools.partial(draw, held_out=True))),
        draw=functools.partial(_train, draw),
        verify=functools.partial(_verify, judge),
        grade=grade,
        columns=columns,
        demonstrate=functools.partial(_demonstrate, solve),
    )


def score(right: Array, formed: Array, partial_credit: float) -> Array:
    """1 if right, else `partial_credit` if well-formed, else 0."""
    return jnp.where(right, 1.0, jnp.where(formed, partial_credit, 0.0)).astype(jnp.float32)


def check_knob(task: str, knob: str, value: float, low: float, high: float) -> None:
    """Raises ValueError naming the knob unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ValueError(f"{task}: {knob} must be from {low} to {high}, got {value}")


def is_held_out(hashed: Array) -> Array:
    """`[]` bool: this fingerprint belongs to the held-out split."""
    return hashed >> 29 == 0


def _train(draw: Callable[..., Prompts], key: Array, n: int) -> Prompts:
    return draw(jax.random.split(key, n), held_out=False)


def _test(draw: Callable[..., Prompts], n: int) -> Prompts:
    # Threefry by name and one folded key per row: the same problems whatever the default generator and whatever n.
    key = jax.random.key(20260101, impl="threefry2x32")
    return draw(jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(n)))


def _draw(
    words: int,
    propose: Callable[[Array], PyTree],
    fingerprint: Callable[[PyTree], Array],
    render: Callable[[PyTree], Piece],
    rows: int,
    keys: Array,
    *,
    held_out: bool,
) -> Prompts:
    def again(state: tuple[Array, PyTree]) -> Array:
        attempt, problem = state
        return (attempt == 0) | (is_held_out(fingerprint(problem)) != held_out)

    def one(key: Array) -> Prompts:
        def redraw(state: tuple[Array, PyTree]) -> tuple[Array, PyTree]:
            return state[0] + 1, propose(jax.random.bits(jax.random.fold_in(key, state[0]), (words,), jnp.uint32))

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(redraw, (jnp.int32(0), None))[1])
        _, problem = jax.lax.while_loop(again, redraw, (jnp.int32(0), nothing))
        tokens, mask = render(problem)
        index = (fingerprint(problem) % jnp.uint32(rows)).astype(jnp.int32)
        return Prompts(context=Context(tokens=tokens, mask=mask), index=index, target=problem)

    return jax.vmap(one)(keys)


def _verify(judge: Callable[[PyTree, Array, Array], Array], prompts: Prompts, tokens: Array, mask: Array) -> Array:
    def group(problem: PyTree, tokens: Array, mask: Array) -> Array:
        return jax.vmap(lambda t, m: judge(problem, *text_of(t, m)))(tokens, mask)

    return jax.vmap(group)(prompts.target, tokens, mask)


def _demonstrate(solve: Callable[[Array, PyTree], tuple[Piece, Piece]], key: Array, prompts: Prompts) -> Logged:
    right, wrong = jax.vmap(solve)(jax.random.bits(key, prompts.index.shape, jnp.uint32), prompts.target)
    tokens, mask = (jnp.stack(pair, axis=1) for pair in zip(right, wrong, strict=True))
    return Logged(tokens=tokens, mask=mask, reward=jnp.broadcast_to(jnp.array([1.0, 0.0]), tokens.shape[:2]))
