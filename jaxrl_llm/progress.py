"""What a run shows while it runs: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxrl_llm.evaluate import Evaluation


class Display:
    """A context manager; outside a terminal it prints about twenty lines a run."""

    def __init__(self, steps: int, *, title: str) -> None:
        self._console = Console()
        self._steps = steps
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self._console,
            disable=not self._live,
        )
        self._title = title

    def __enter__(self) -> Display:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._steps, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def stepped(self, done: int, metrics: dict[str, float], seconds: float) -> None:
        """Shows the step's numbers; `seconds` is what one step took."""
        rate = metrics["tokens/generated"] / max(seconds, 1e-9)
        numbers = (
            f"reward {metrics['reward/mean']:.3f}  entropy {metrics['entropy']:.3f}  "
            f"length {metrics['length/mean']:.1f}  {seconds:.2f} s/step  {rate:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=done, numbers=numbers)
        every = max(1, self._steps // 20)
        if not self._live and (done == 1 or done % every == 0):
            self.say(f"step {done:>5}/{self._steps}  {numbers}")

    def evaluated(self, done: int, evaluation: Evaluation) -> None:
        self.say(
            f"step {done:>5}/{self._steps}  held-out: greedy accuracy {evaluation.accuracy:.3f}, "
            f"mean reward {evaluation.reward:.3f} on {evaluation.problems} problems"
        )

    def transcripts(self, before: Evaluation, after: Evaluation) -> None:
        """The same held-out problems, answered before and after."""
        for old, new in zip(before.transcripts, after.transcripts, strict=True):
            self.say(f"\nprompt  {_line(old)}")
            for name, text in (("before", old), ("after", new)):
                self.say(f"{name:>7} {text['response']!r}  reward {text['reward']:g}")


def _line(text: dict[str, Any]) -> str:
    return repr(text["prompt"])
