import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.tasks import characters as ch

TOKENIZER = ch.character_tokenizer()


def text(piece):
    tokens, keep = piece
    return ch.decode(np.asarray(tokens)[np.asarray(keep)])


def test_vocabulary_is_64_ids_with_padding_and_eos_first():
    assert len(TOKENIZER) == TOKENIZER.vocab_size == ch.VOCABULARY == 64
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id) == (ch.PAD, ch.EOS) == (0, 1)
    assert set("0123456789abcdefghijklmnopqrstuvwxyz \n+-*/=(),;:><?.#|_") <= set(ch.CHARACTERS)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from(ch.CHARACTERS), max_size=30))
def test_decode_inverts_encode(string):
    ids = TOKENIZER.encode(string)
    assert ids == ch.encode(string)
    assert TOKENIZER.decode(ids) == ch.decode(ids) == string


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    string = " a  b\n 1 + 1 = 2 . , ! ' [x]\n\n"
    assert again.encode(string) == ch.encode(string) and again.decode(ch.encode(string)) == string
    assert (again.pad_token_id, again.eos_token_id, len(again)) == (0, 1, 64)
    assert again.decode([0, *ch.encode("7"), 1], skip_special_tokens=True) == "7"


def test_characters_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="'É' is not one of the 62 characters"):
        ch.encode("1É")
    with pytest.raises(Exception, match=r"(?i)unk"):
        TOKENIZER.encode("É")


@pytest.mark.parametrize(("value", "width"), [(0, 1), (0, 3), (7, 3), (10, 2), (100, 3), (90210, 7)])
def test_numbers(value, width):
    assert text(ch.number(jnp.int32(value), width)) == str(value)
    assert text(ch.digits(jnp.array([int(d) for d in str(value).zfill(width)]))) == str(value)


def test_join_packs_pieces_and_cuts_on_the_right():
    pieces = [ch.literal("ab"), ch.symbol(jnp.array(ch.IDS["c"]), False), ch.number(jnp.int32(5), 3), ch.end()]
    tokens, mask = jax.jit(lambda: ch.join(pieces, 6))()
    assert tokens.tolist() == [*ch.encode("ab5"), ch.EOS, ch.PAD, ch.PAD] and mask.tolist() == [True] * 4 + [False] * 2
    tokens, mask = ch.join(pieces, 3)
    assert ch.decode(tokens) == "ab5" and mask.all()


def test_text_of_stops_at_eos_and_skips_masked_tokens():
    tokens = jnp.array([*ch.encode("a1b"), ch.PAD, *ch.encode("c"), ch.EOS, *ch.encode("d")])
    mask = jnp.array([True, False, True, True, True, True, True])
    packed, length = ch.text_of(tokens, mask)
    assert ch.decode(packed[:length]) == "abPADc"
    packed, length = ch.text_of(tokens, mask.at[5].set(False))  # an EOS that is not the policy's ends nothing
    assert ch.decode(packed[:length]) == "abPADcd"
    assert ch.text_of(tokens, jnp.zeros(7, bool))[1] == 0


def test_after_last():
    tokens = jnp.array(ch.encode("1>23>45"))
    rest, length, found = ch.after_last(tokens, jnp.int32(6), ">")
    assert ch.decode(rest[:length]) == "4" and found
    rest, length, found = ch.after_last(tokens, jnp.int32(1), ">")
    assert ch.decode(rest[:length]) == "1" and not found


def test_equals_compares_rows_of_different_size():
    a, b = jnp.array(ch.encode("12345")), jnp.array(ch.encode("129"))
    assert ch.equals(a, jnp.int32(2), b, jnp.int32(2))
    assert not ch.equals(a, jnp.int32(3), b, jnp.int32(3))
    assert not ch.equals(a, jnp.int32(5), b, jnp.int32(3))
    assert not ch.equals(a, jnp.int32(2), b, jnp.int32(3))


def test_fingerprints_spread():
    rows = jax.random.randint(jax.random.key(0), (20000, 6), 0, 3)
    hashes = np.asarray(jax.vmap(ch.fingerprint)(rows))
    distinct = len(np.unique(np.asarray(rows), axis=0))
    assert len(np.unique(hashes)) == distinct
    bits = np.unpackbits(np.unique(hashes).view(np.uint8).reshape(-1, 4), axis=1).mean(0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(distinct)
    assert ch.fingerprint(jnp.array([1, 2])) != ch.fingerprint(jnp.array([2, 1]))
    assert int(ch.fingerprint(jnp.array([1, 2, 3]))) == EXPECTED


def test_choose_is_uniform_over_what_is_allowed():
    noise = jax.random.bits(jax.random.key(0), (6000,))
    chosen = np.asarray(jax.vmap(lambda w: ch.choose(w, jnp.array([True, False, True, True])))(noise))
    share = np.bincount(chosen, minlength=4) / 6000
    assert share[1] == 0 and np.abs(share[[0, 2, 3]] - 1 / 3).max() < 0.03


def _reference_mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return x ^ (x >> 16)


EXPECTED = _reference_mix(sum(_reference_mix(v + 0x9E3779B9 * i & 0xFFFFFFFF) for i, v in enumerate((1, 2, 3))) % 2**32)
