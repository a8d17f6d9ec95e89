"""Final answers in text: finding them and comparing them exactly.

A number is an optional sign and `$` in either order, then digits, plain or with a comma before every three, then an
optional `.digits`, an optional `/digits` (a fraction) and an optional `%`, which is dropped: `18`, `-3`, `$1,000.50`,
`1/2`, `.5`. It stands alone: it is not a part of a word or of a longer run such as `1,00`, `1.2.3` or `1e5`, and a sign
counts only where no digit, letter or closing bracket comes before it (`5-3` ends in 3). Units may follow it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

MARKER = "####"
# Python refuses to read longer integers (CVE-2020-10735); nothing that long is an answer.
LONGEST = 1000

_NUMBER = re.compile(
    r"""
    (?<![0-9A-Za-z_]) (?<![0-9][.,/])       # not the rest of a word or of a longer run
    (?: (?<![)\]}]) [-+\u2212] \$? | \$ [-+\u2212]? )?
    (?: [0-9]{1,3} (?: ,[0-9]{3} )++ | [0-9]++ )?+
    (?: (?<=[0-9]) (?: \.[0-9]++ )?+ | \.[0-9]++ )
    (?: / [0-9]++ )?+
    (?! [0-9] | [.,/][0-9] | [eE][-+]?[0-9] )
    %?
    """,
    re.VERBOSE,
)
_MARKED = re.compile(rf"{re.escape(MARKER)}\s*+({_NUMBER.pattern})", re.VERBOSE)


def parse_number(text: str) -> Fraction | None:
    """The number a text is, white space around it aside; None if it is anything else (also `1/0`)."""
    match = _NUMBER.fullmatch(text.strip())
    return _value(match.group()) if match else None


def final_number(text: str) -> Fraction | None:
    """The last number that follows a `####`; without such a one the last number of the text; None if there is none."""
    marked = [match.group(1) for match in _MARKED.finditer(text)]
    found = marked or _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def gold_answer(text: str) -> str:
    """What follows the last `####`, commas and white space stripped.

    Raises:
      ValueError: no `####`, or something other than a number after it; the message says what was expected.
    """
    _, marker, answer = text.rpartition(MARKER)
    if not marker:
        raise ValueError(f'expected a final answer after "{MARKER}"')
    if parse_number(answer) is None:
        raise ValueError(f'expected a number after "{MARKER}", got {answer.strip()[:40]!r}')
    return answer.strip().replace(",", "")


def grade_number(prompts: list[str], completions: list[str], *, answer: list[str], **_: Any) -> list[float | None]:
    """1 where a completion's `final_number` equals `answer` as an exact fraction, else 0; None if `answer` is none."""
    scores: list[float | None] = []
    for text, right in zip(completions, answer, strict=True):
        wanted = parse_number(right)
        scores.append(None if wanted is None else float(final_number(text) == wanted))
    return scores


def grade_answer(prompts: list[str], completions: list[str], *, answer: list[str], **_: Any) -> list[float | None]:
    """`grade_number` where `answer` is a number; elsewhere 1 if the completion is `answer`, white space aside, else 0.

    Of a completion with `####` only what follows the last one is compared.
    """
    scores: list[float | None] = []
    for text, right in zip(completions, answer, strict=True):
        wanted = parse_number(right)
        said = text.rpartition(MARKER)[2].split()
        scores.append(float(said == right.split() if wanted is None else final_number(text) == wanted))
    return scores


def _value(number: str) -> Fraction | None:
    plain = re.sub(r"[$,%+]", "", number).replace("\u2212", "-")
    above, _, below = plain.partition("/")
    if len(plain) > LONGEST or (below and int(below) == 0):
        return None
    return Fraction(above) / Fraction(below or 1)
