"""A verifier in a process of its own: it may hang, crash or talk nonsense, and training goes on."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import math
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("_worker.py")
START = 120.0  # seconds a worker has to import the verifier
FAULTS = ("hung", "crashed", "raised", "nonsense")

Grade = Callable[..., list[float | None]]


class Isolated:
    """`grade` as a function that always returns, within `(1 + responses) * seconds` and restarts of the worker.

    All responses are graded in one call, as `grade` expects. If that call does not return, ends its process, raises, or
    returns something else than one value for each response, each response is graded alone, and those with which it
    happens again get None: they are left out of statistics and loss, not scored 0. A value that is neither a finite
    number nor None becomes None too.

    `counts` says how many responses got None for which of `FAULTS`; `last` what was seen last.

    Args:
      grade: as in `Task`; a function of a module, or a `functools.partial` of one whose arguments fit into JSON.
      seconds: a call may take.

    Raises:
      ValueError: `seconds` is not positive, or `grade` cannot be found by its name in another process.
      ImportError: the other process cannot import it.
    """

    def __init__(self, grade: Grade, seconds: float) -> None:
        if not 0 < seconds < math.inf:
            raise ValueError(f"a verifier's time limit must be a positive number of seconds, got {seconds}")
        self._address, self._seconds = address(grade), seconds
        self.__qualname__ = f"{self._address['module']}.{self._address['name']}"
        self.counts, self.last = dict.fromkeys(FAULTS, 0), ""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        fault, message = self._start()
        if fault:
            self.close()
            raise ImportError(f"the verifier {self.__qualname__} cannot be used in a process of its own: {message}")
        atexit.register(self.close)

    def __call__(self, prompts: list[str], completions: list[str], **columns: list[Any]) -> list[float | None]:
        """Scores of the completions; None where there is none."""
        with self._lock:
            fault, found = self._ask(prompts, completions, columns)
            if not fault:
                return self._checked(found)
            scores: list[float | None] = []
            for i in range(len(completions)):
                one = {name: column[i : i + 1] for name, column in columns.items()}
                fault, found = self._ask(prompts[i : i + 1], completions[i : i + 1], one)
                if fault:
                    self._count(fault, found)
                scores += [None] if fault else self._checked(found)
            return scores

    def close(self) -> None:
        """Ends the process; a later call starts another."""
        process, self._process, self._buffer = self._process, None, b""
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):  # of what it did not read
                    pipe.close()

    def _checked(self, scores: list[float | str | None]) -> list[float | None]:
        for score in scores:
            if isinstance(score, str):
                self._count("nonsense", score)
        return [None if isinstance(score, str) else score for score in scores]

    def _count(self, fault: str, message: Any) -> None:
        self.counts[fault] += 1
        self.last = f"{fault}: {message}"

    def _ask(self, prompts: list[str], completions: list[str], columns: dict[str, Any]) -> tuple[str, Any]:
        """`("", scores)`, or which fault and what is known of it."""
        if self._process is None:
            fault, message = self._start()
            if fault:
                self.close()
                return fault, message
        request = {"prompts": prompts, "completions": completions, **columns}
        fault, found = self._exchange(request, self._seconds)
        if fault in ("hung", "crashed"):
            self.close()
        if not fault and len(found) != len(completions):
            return "nonsense", f"{len(found)} scores for {len(completions)} responses"
        return fault, found

    def _start(self) -> tuple[str, Any]:
        # The worker shall neither take an accelerator nor get the terminal's Ctrl-C.
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        return self._exchange({**self._address, "path": sys.path, "seconds": self._seconds}, START)

    def _exchange(self, message: Any, seconds: float) -> tuple[str, Any]:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        line = (json.dumps(message, default=_plain) + "\n").encode()
        end = time.monotonic() + seconds
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            return "crashed", f"exit status {self._process.wait()}"
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                return "hung", f"no answer within {seconds:g} s"
            if select.select([self._process.stdout], [], [], left)[0]:
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    return "crashed", f"exit status {self._process.wait()}"
                self._buffer += read
        answer, _, self._buffer = self._buffer.partition(b"\n")
        fault, found = json.loads(answer)
        return fault, found


def address(grade: Any) -> dict[str, Any]:
    """Where another process finds a function: module, name, and the arguments bound to it.

    Raises:
      ValueError: it has no such place (a lambda, a function inside another, one typed into a session), or its arguments
        do not fit into JSON.
    """
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    while isinstance(grade, functools.partial):
        arguments, keywords, grade = [*grade.args, *arguments], {**grade.keywords, **keywords}, grade.func
    module, name = getattr(grade, "__module__", None), getattr(grade, "__qualname__", "<")
    if module in (None, "__main__") or "<" in name:
        raise ValueError(
            f"a verifier in a process of its own must be a function of a module, or a functools.partial of one; "
            f"got {grade!r}"
        )
    try:
        json.dumps([arguments, keywords])
    except TypeError as error:
        raise ValueError(f"arguments bound to the verifier {name} do not fit into JSON: {error}") from error
    return {"module": module, "name": name, "arguments": arguments, "keywords": keywords}


def _plain(x: Any) -> Any:
    """numpy's arrays and scalars."""
    if hasattr(x, "tolist"):
        return x.tolist()
    raise TypeError(f"a column of a verifier in a process of its own must fit into JSON, got {type(x).__name__}")
