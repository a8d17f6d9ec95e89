"""Sixty-four characters: the tokenizer of the procedural tasks, and text handling inside the graph.

In the graph a piece of text is a pair `(tokens [N], keep [N])`: the characters that may stand there and whether they
do; `join` packs pieces to the left. All functions are for one row; `vmap` makes the batch.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

PAD, EOS = 0, 1
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz \n+-*/=(),;:><?.#|_!'\"[]%^"
# Upper case, because no other token has it: a sampled padding token can never read as an answer or as a marker.
SPECIAL = ("PAD", "EOS")
VOCABULARY = len(SPECIAL) + len(CHARACTERS)
IDS = {character: len(SPECIAL) + i for i, character in enumerate(CHARACTERS)}
ZERO = IDS["0"]

Piece = tuple[Array, Array]


def character_tokenizer() -> Any:
    """One token per character, 64 ids (padding 0, EOS 1), as a `transformers.PreTrainedTokenizerFast`.

    `decode(encode(text)) == text` for every text of `CHARACTERS`; other characters raise.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="UNKNOWN"))  # absent, hence an error
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        clean_up_tokenization_spaces=False,
    )


def encode(text: str) -> list[int]:
    """The ids of a text. Raises ValueError naming the first character that is not in the vocabulary."""
    if unknown := [character for character in text if character not in IDS]:
        raise ValueError(f"{unknown[0]!r} is not one of the {len(CHARACTERS)} characters {CHARACTERS!r}")
    return [IDS[character] for character in text]


def decode(ids: Any) -> str:
    """The text of ids, special tokens spelled out."""
    return "".join((*SPECIAL, *CHARACTERS)[int(i)] for i in ids)


def literal(text: str) -> Piece:
    """A constant piece of text."""
    tokens = jnp.array(encode(text), jnp.int32)
    return tokens, jnp.ones(tokens.shape, bool)


def end() -> Piece:
    """EOS, which is a token of the response."""
    return jnp.array([EOS], jnp.int32), jnp.ones(1, bool)


def symbol(token: Array, keep: Array | bool = True) -> Piece:
    """One character that may be absent: `[]` token, `[]` bool."""
    return jnp.reshape(token, 1).astype(jnp.int32), jnp.reshape(jnp.asarray(keep), 1)


def number(value: Array, width: int) -> Piece:
    """`[]` non-negative integer below `10**width` as decimal digits without leading zeros."""
    digits = value // 10 ** jnp.arange(width - 1, -1, -1)
    return digits % 10 + ZERO, (digits > 0) | (jnp.arange(width) == width - 1)


def digits(values: Array) -> Piece:
    """`[N]` digits, most significant first, as a number without leading zeros (one digit is always kept)."""
    significant = jnp.cumsum(values) > 0
    return values + ZERO, significant | (jnp.arange(values.shape[0]) == values.shape[0] - 1)


def join(pieces: list[Piece], length: int) -> Piece:
    """The pieces one after the other, packed to the left: `(tokens [length] right-padded, mask [length])`.

    What does not fit into `length` is cut off on the right.
    """
    tokens, keep = (jnp.concatenate([piece[i].reshape(-1) for piece in pieces]) for i in (0, 1))
    places = jnp.where(keep, jnp.cumsum(keep) - 1, length)
    packed = jnp.full(length, PAD, jnp.int32).at[places].set(tokens.astype(jnp.int32), mode="drop")
    return packed, jnp.arange(length) < keep.sum()


def text_of(tokens: Array, mask: Array) -> tuple[Array, Array]:
    """What a response says: its masked tokens up to the first EOS, packed to the left.

    Args:
      tokens, mask: `[T]`.

    Returns:
      `(tokens [T], length [])`. A response without EOS says all of its tokens.
    """
    before = jnp.cumsum(mask & (tokens == EOS)) == 0
    packed, kept = join([(tokens, mask & before)], tokens.shape[0])
    return packed, kept.sum()


def after_last(tokens: Array, length: Array, marker: str) -> tuple[Array, Array, Array]:
    """What follows the last `marker` (one character): `(tokens [T], length [], found [])`; the whole text if none."""
    places = jnp.arange(tokens.shape[0])
    start = jnp.max(jnp.where((tokens == IDS[marker]) & (places < length), places + 1, 0))
    return jnp.take(tokens, places + start, mode="fill", fill_value=PAD), length - start, start > 0


def equals(tokens: Array, length: Array, expected: Array, expected_length: Array) -> Array:
    """`[]` bool: the two texts `[T]` and `[N]` of the given lengths are the same."""
    shared = min(tokens.shape[0], expected.shape[0])
    beyond = jnp.arange(shared) >= length
    same = jnp.all((tokens[:shared] == expected[:shared]) | beyond)
    return same & (length == expected_length)


def consists_of(tokens: Array, length: Array, allowed: Array) -> Array:
    """`[]` bool: the text is not empty and has only characters of `allowed [A]`."""
    known = jnp.any(tokens[:, None] == allowed, axis=1) | (jnp.arange(tokens.shape[0]) >= length)
    return jnp.all(known) & (length > 0)


def fingerprint(values: Array) -> Array:
    """`[]` uint32 hash of integers `[N]`, the same on every device."""
    positions = jnp.arange(values.shape[0], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
    return mix(jnp.sum(mix(values.astype(jnp.uint32) + positions), dtype=jnp.uint32))


def mix(x: Array) -> Array:
    """A bijection of uint32 that spreads every bit (the finaliser of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def below(noise: Array, n: Array | int) -> Array:
    """int32 from 0 to `n - 1` by uint32 noise of any shape, each as probable as the others but for `n / 2**32`."""
    return (noise % jnp.asarray(n, jnp.uint32)).astype(jnp.int32)


def choose(noise: Array, allowed: Array) -> Array:
    """`[]` int32: one of the places where `allowed [N]` holds, all as probable, by one word of uint32 noise `[]`."""
    nth = below(noise, allowed.sum())
    return jnp.argmax(jnp.cumsum(allowed) == nth + 1).astype(jnp.int32)
