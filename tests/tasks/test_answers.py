from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.tasks.answers import final_number, gold_answer, grade_answer, grade_number, parse_number

NUMBERS = {
    "18": 18,
    " 18 ": 18,
    "1,000": 1000,
    "1,234,567.50": Fraction("1234567.5"),
    "$18": 18,
    "18.0": 18,
    "18.00": 18,
    "-3": -3,
    "\u22123": -3,
    "-$3": -3,
    "$-3": -3,
    "+4": 4,
    "1/2": Fraction(1, 2),
    "-1/2": Fraction(-1, 2),
    "2/4": Fraction(1, 2),
    ".5": Fraction(1, 2),
    "0.1": Fraction(1, 10),
    "50%": 50,
    "007": 7,
    "0": 0,
    "-0": 0,
    "12345678901234567890123456789": 12345678901234567890123456789,
    "": None,
    "x": None,
    "1/0": None,
    "0/0": None,
    "1,00": None,
    "1,0000": None,
    "1000,000": None,
    "1.2.3": None,
    "1/2/3": None,
    "1e5": None,
    "3 4": None,
    "- 3": None,
    "--3": None,
    "$": None,
    "-": None,
    ".": None,
    "5.": None,
    "\u0661\u0662": None,  # digits, but not of this notation
    "9" * 5000: None,
    "1/" + "9" * 5000: None,
    "nan": None,
    "inf": None,
}
FINAL = {
    "so #### 18": 18,
    "####18": 18,
    "#### $1,000.": 1000,
    "#### 18 dollars": 18,
    "####\n-3\n": -3,
    "#### 3\n#### 4": 4,
    "#### 3 and then 5": 3,
    "7 #### none": 7,
    "#### none, but 5 of 6": 6,
    "the answer is 42.": 42,
    "5-3": 3,
    "x = -3": -3,
    "(2)-3": 3,
    "costs US$18": 18,
    "between 3 and 1/2": Fraction(1, 2),
    "**18**": 18,
    "18km in version 1.2.3": 18,
    "on 2024/01/05": None,
    "a4 b5": None,
    "#### 1,00": None,
    "#### 1/0": None,
    "": None,
    "####": None,
    "no number": None,
    "#### 12 #### x": 12,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:20])
def test_parse_number(text):
    assert parse_number(text) == NUMBERS[text]


@pytest.mark.parametrize("text", FINAL)
def test_final_number(text):
    assert final_number(text) == FINAL[text]


@settings(max_examples=300, deadline=None)
@given(st.fractions(), st.integers(0, 3), st.booleans())
def test_numbers_written_out_are_read_back(value, zeros, grouped):
    above = f"{value.numerator:,}" if grouped else str(value.numerator)
    text = above + (f"/{value.denominator}" if value.denominator > 1 else "." + "0" * zeros if zeros else "")
    assert parse_number(text) == value == final_number(f"first 7, then #### {text}")


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("0123456789,.-+$/#%e \n(x\u2212\u0661"), max_size=20))
def test_any_text_is_scored(text):
    assert grade_number(["?"], [text], answer=["5"]) in ([0.0], [1.0])
    assert grade_answer(["?"], [text], answer=["a word"]) in ([0.0], [1.0])


def test_long_junk_takes_no_time():
    for junk in ("9" * 100_000, "1," * 50_000, "1/" * 50_000, "-" * 100_000, "#### " * 20_000, "1.1" * 30_000):
        assert grade_number(["?"], [junk], answer=["5"]) == [0.0]


def test_comparison_is_exact():
    near = "0.1000000000000000055511151231257827"  # the double nearest to 0.1
    assert grade_number([""] * 4, ["0.1", near, "1/10", "0.10"], answer=["0.1"] * 4) == [1.0, 0.0, 1.0, 1.0]
    large = "9007199254740993"  # 2**53 + 1
    assert grade_number([""] * 2, [large, "9007199254740992"], answer=[large] * 2) == [1.0, 0.0]
    assert grade_number([""], ["5"], answer=["five"]) == [None]


def test_answers_that_are_not_numbers_are_compared_as_words():
    said = ["Paris", " Paris \n", "it is Paris", "so #### Paris", "paris", ""]
    assert grade_answer([""] * 6, said, answer=["Paris"] * 6) == [1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert grade_answer([""] * 2, ["18.0", "#### $18"], answer=["18"] * 2) == [1.0, 1.0]


def test_gold_answer():
    assert gold_answer("a #### 3\nb\n#### 1,234 ") == "1234"
    with pytest.raises(ValueError, match='expected a final answer after "####"'):
        gold_answer("1234")
    with pytest.raises(ValueError, match="expected a number after \"####\", got 'many'"):
        gold_answer("#### many")
