"""What a run does on the host between two programs: lines, evaluations, checkpoints, and what to do about faults."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxrl_llm import folder
from jaxrl_llm.checkpoint import Checkpoints, SaveError
from jaxrl_llm.evaluate import Evaluation
from jaxrl_llm.progress import Display
from jaxrl_llm.types import Metrics, PyTree, TrainState

PATIENCE = 5  # returns to a checkpoint that did not get a run past the step that made it return


class Preempted(Exception):
    """The run was told to end (SIGTERM), and did; `step` is the newest checkpoint, 0 for none."""

    def __init__(self, step: int) -> None:
        super().__init__(f"ended as told to; its checkpoint is of step {step}")
        self.step = step


class BadUpdate(Exception):
    """An update that was not finite, or too large, ended the run; the state before it is saved."""


class GoBack(Exception):
    """An update was bad; the run is to go on from a checkpoint."""


class _Now(Exception):
    """Told to end while nothing would be lost by it."""


class Preemption:
    """Listens for SIGTERM. In several processes JAX does, so that all end after the same step."""

    def __init__(self) -> None:
        self._asked = self._at_once = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Only Python's main thread can; in others nothing changes."""
        if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
            yield self
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """In here being told raises, as soon as Python runs."""
        if self._asked:
            raise _Now
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def asked(self, step: int) -> bool:
        """Whether to end after this step."""
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._at_once:
            raise _Now


@dataclasses.dataclass
class Record:
    """What a run knows besides its state, and a checkpoint keeps beside it.

    step: steps taken. cursor: batches drawn from the task's iterator. seconds: training time. returns: times the run
    went back to a checkpoint; `stumbled` the step that made it, `landed` the checkpoint, `vain` how often in a row that
    did not get it past the step. evaluations: by step.
    """

    step: int = 0
    cursor: int = 0
    seconds: float = 0.0
    returns: int = 0
    stumbled: int = 0
    landed: int = 0
    vain: int = 0
    evaluations: dict[int, Evaluation] = dataclasses.field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return vars(self) | {"evaluations": {str(step): finite(e._asdict()) for step, e in self.evaluations.items()}}

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Record:
        """What `plain` gave; other entries are left out, and what an older version did not give has its default."""
        values = {field.name: plain[field.name] for field in dataclasses.fields(cls) if field.name in plain}
        evaluations = {int(step): Evaluation(**_number(e)) for step, e in values.pop("evaluations").items()}
        return cls(**values, evaluations=evaluations)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a configuration says of a run's outer loop; see `job.TrainConfig`."""

    steps: int
    eval_every: int
    checkpoint_every: int
    save_errors: Literal["stop", "continue"]
    bad_updates: Literal["apply", "skip", "stop", "back"]


class Watch:
    """Called after every program with the steps it took; `record` is what it has seen.

    Raises (all of them end `run`):
      Preempted, BadUpdate, GoBack: see there.
      SaveError: a file cannot be written, and the plan is to stop then.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        record: Record,
        beside: dict[str, Any],
        lines: folder.Lines,
        log: Callable[..., None],
        display: Display,
        checkpoints: Checkpoints,
        preemption: Preemption,
        evaluate: Callable[[PyTree], Evaluation],
        counts: dict[str, int] | None = None,
    ) -> None:
        self.record = record
        self._plan, self._beside, self._lines, self._log, self._display = plan, beside, lines, log, display
        self._checkpoints, self._preemption, self._evaluate = checkpoints, preemption, evaluate
        self._counts, self._counted = counts, dict(counts or {})
        self._rewards: list[float] = []
        self._told: set[str] = set()
        self._unsaved: set[str] = set()
        self._last_save = record.step
        self._clock = time.perf_counter()

    def __call__(self, _: int, state: TrainState, metrics: Metrics) -> None:
        values = {name: np.asarray(x) for name, x in metrics.items()}  # waits for the step
        self._add_lines(values)
        self._judge(state, values)
        step, plan = self.record.step, self._plan
        if plan.eval_every and step % plan.eval_every == 0 and step < plan.steps:
            self.evaluate(state)
        every = plan.checkpoint_every
        if step == plan.steps or (every and step // every > self._last_save // every):
            self.save(state)
        else:
            self._try(self._checkpoints.check)
        if step < plan.steps and self._preemption.asked(step):
            self._end(state)
        self._clock = time.perf_counter()

    def evaluate(self, state: TrainState) -> Evaluation:
        """Of the state's policy, and remembered; being told to end ends it at once."""
        step = self.record.step
        try:
            with self._preemption.at_once():
                found = self._evaluate(state.params)
        except _Now:
            self._end(state)
            raise AssertionError from None
        self.record.evaluations[step] = found
        self._display.evaluated(step, found)
        faults = self._new_faults()  # they are no step's
        if any(faults.values()):
            self._log("verifier failed", step=step, **faults)
        if math.isnan(found.accuracy):
            self._display.say("the verifier scored not a single held-out answer")
        self._log("evaluated", step=step, accuracy=finite(found.accuracy), reward=finite(found.reward))
        self._clock = time.perf_counter()
        return found

    def save(self, state: TrainState, wait: bool = False, must: bool = False) -> None:
        """A checkpoint of this step; `wait` until it is there, and raise SaveError whatever the plan if it `must`."""
        step = self.record.step
        score = self.record.evaluations[step].accuracy if step in self.record.evaluations else math.nan
        if not self._plan.eval_every and self._rewards:
            score = float(np.mean(self._rewards))

        def write() -> None:
            self._lines.flush(disk=True)
            self._checkpoints.save(step, state, self._beside | self.record.plain(), finite(score))
            if wait:
                self._checkpoints.wait()

        if self._try(write, must):
            self._log("checkpoint", step=step, score=finite(score))
            self._unsaved.clear()
            self._rewards = []
        self._last_save = step

    def _end(self, state: TrainState) -> None:
        if self.record.step:
            self.save(state, wait=True)
        last = max(self._checkpoints.steps(), default=0)
        self._log("preempted", step=self.record.step, checkpoint=last)
        raise Preempted(last)

    def _try(self, write: Callable[[], Any], must: bool = False) -> bool:
        """Whether it could be written. What went wrong is said once for every kind, until a checkpoint is saved."""
        try:
            write()
            return True
        except OSError as error:
            kind = type(error).__name__
            if kind not in self._unsaved:
                self._log("not saved", step=self.record.step, error=str(error))
            if must or self._plan.save_errors == "stop":
                raise error if isinstance(error, SaveError) else SaveError(str(error)) from error
            if kind not in self._unsaved:
                self._display.say(f"not saved, going on: {error}")
            self._unsaved.add(kind)
            return False

    def _add_lines(self, values: dict[str, np.ndarray]) -> None:
        spent, record = time.perf_counter() - self._clock, self.record
        steps = len(values["loss"])
        faults = self._new_faults()
        for i in range(steps):
            record.step, record.cursor = record.step + 1, record.cursor + 1
            record.seconds += spent / steps
            line: dict[str, Any] = {"step": record.step, "seconds": round(record.seconds, 4)}
            line |= {name: finite(x[i]) for name, x in values.items()}
            self._lines.add(line | {name: n if i == steps - 1 else 0 for name, n in faults.items()})
        self._rewards += [float(x) for x in values["reward/mean"] if math.isfinite(x)]
        self._try(self._lines.flush)
        self._display.stepped(record.step, {name: float(x[-1]) for name, x in values.items()}, spent / steps)

    def _new_faults(self) -> dict[str, int]:
        """Responses the verifier failed on since the last program, by `verifier/fault`."""
        if self._counts is None:
            return {}
        found = {f"verifier/{name}": n - self._counted[name] for name, n in self._counts.items()}
        self._counted = dict(self._counts)
        if any(found.values()) and "verifier" not in self._told:
            self._told.add("verifier")
            self._display.say(f"the verifier failed, and those responses do not count: {found}")
        return found

    def _judge(self, state: TrainState, values: dict[str, np.ndarray]) -> None:
        """What follows from updates that were not finite or too large."""
        step, how = self.record.step, self._plan.bad_updates
        bad = values["skipped"] > 0 if "skipped" in values else ~np.isfinite(values["loss"])
        if not bad.any():
            return
        names = [name for name in ("loss", "grad_norm") if name in values]
        numbers = {name: finite(values[name][bad][0]) for name in names}
        self._log("bad update", step=step - len(bad) + 1 + int(bad.argmax()), done=how, **numbers)
        if how == "apply" and "bad" not in self._told:
            self._display.say(f"the loss of step {step} is not finite; --bad-updates says what to do about it")
            self._told.add("bad")
        if how == "stop":
            self.save(state, wait=True)
            raise BadUpdate(f"the update of step {step} was bad ({_shown(numbers)}); the state without it is saved")
        if how == "back":
            raise GoBack
        if how == "skip":
            self._display.say(f"step {step}: a bad update ({_shown(numbers)}) is left out")

    def back(self, like: TrainState) -> TrainState:
        """After `GoBack`: the newest checkpoint of an earlier step than the last one it went back to did not help.

        The state's key is another one then, and the task's iterator goes on where it was: what led to the bad update is
        not repeated.

        Raises:
          BadUpdate: there is no such checkpoint, or going back did not help `PATIENCE` times.
        """
        now = self.record
        again = now.returns > 0 and now.step <= now.stumbled
        before, vain = (now.landed, now.vain + 1) if again else (now.step, 0)
        saved = self._checkpoints.restore(like, before=before)
        if saved is None or vain >= PATIENCE:
            why = "there is no checkpoint left to go back to" if saved is None else f"{vain} returns did not help"
            raise BadUpdate(f"the update of step {now.step} was bad, and {why}")
        self.record = dataclasses.replace(
            Record.of(saved.run), cursor=now.cursor, seconds=now.seconds, returns=now.returns + 1, vain=vain
        )
        self.record.stumbled, self.record.landed = max(now.step, now.stumbled), saved.step
        self._checkpoints.forget(after=saved.step)
        self._lines.cut(saved.step)
        self._last_save, self._rewards = saved.step, []
        self._log("went back", step=now.step, to=saved.step)
        self._display.say(f"step {now.step}: a bad update; going back to step {saved.step} and on with other prompts")
        return dataclasses.replace(saved.state, key=jax.random.fold_in(saved.state.key, self.record.returns))


def finite(x: Any) -> Any:
    """Numbers as JSON has them, None for those it has not; also inside dicts and lists."""
    if isinstance(x, dict):
        return {name: finite(value) for name, value in x.items()}
    if isinstance(x, list):
        return [finite(value) for value in x]
    if isinstance(x, float | np.ndarray | np.generic):
        return float(x) if math.isfinite(x) else None
    return x


def _number(x: Any) -> Any:
    """The way back."""
    if isinstance(x, dict):
        return {name: _number(value) for name, value in x.items()}
    if isinstance(x, list):
        return [_number(value) for value in x]
    return math.nan if x is None else x


def _shown(numbers: Mapping[Any, Any]) -> str:
    return ", ".join(f"{name} {'not finite' if x is None else json.dumps(x)}" for name, x in numbers.items())
