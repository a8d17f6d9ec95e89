"""The other end of `isolated.Isolated`: run as a script, it grades what it reads, a JSON line for a JSON line.

It imports nothing of the package, so that it starts as fast as the verifier can be imported.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import numbers
import os
import signal
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a verifier prints is not an answer

    def answer(fault: str, found: Any) -> None:
        answers.write(json.dumps([fault, found]) + "\n")
        answers.flush()

    start = json.loads(sys.stdin.readline())
    # The script's own folder is not on the path of the verifier; its neighbours would hide other modules.
    sys.path[:] = start["path"]
    try:
        grade: Any = functools.reduce(getattr, start["name"].split("."), importlib.import_module(start["module"]))
    except Exception as error:
        return answer("crashed", repr(error))
    answer("", None)
    for line in sys.stdin:
        # Should nobody be left to end a verifier that hangs, the system does, whatever Python is doing.
        signal.alarm(math.ceil(start["seconds"]) + 5)
        try:
            scores = grade(*start["arguments"], **start["keywords"], **json.loads(line))
        except Exception as error:
            answer("raised", repr(error)[:500])
        else:
            answer(*_listed(scores))
        signal.alarm(0)


def _listed(scores: Any) -> tuple[str, Any]:
    if hasattr(scores, "tolist"):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple):
        return "nonsense", f"{type(scores).__name__} instead of a list of numbers"
    return "", [_score(score) for score in scores]


def _score(score: Any) -> float | str | None:
    """A finite number, None, or what it is instead as text."""
    if hasattr(score, "tolist"):
        score = score.tolist()
    if score is None or (isinstance(score, float) and math.isnan(score)):
        return None
    try:
        if isinstance(score, numbers.Real) and math.isfinite(score):
            return float(score)
    except (OverflowError, ValueError):
        pass
    return repr(score)[:200]


if __name__ == "__main__":
    main()
