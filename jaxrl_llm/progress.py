"""What a run shows while it runs: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from jaxrl_llm.evaluate import Evaluation

BARS = "▁▂▃▄▅▆▇█"


class Display:
    """A context manager; outside a terminal it prints about twenty lines a run, and nothing if `quiet`."""

    def __init__(self, steps: int, *, title: str, quiet: bool = False) -> None:
        self._console = Console(highlight=False, markup=False, soft_wrap=True, quiet=quiet)
        self._steps = steps
        self._live = self._console.is_terminal
        self._progress = _Bar(console=self._console, disable=not self._live)
        self._title = title
        self._rewards: list[float] = []

    def __enter__(self) -> Display:
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints above the bar."""
        self._console.print(text)

    def stepped(self, done: int, metrics: dict[str, float], seconds: float) -> None:
        """Shows the step's numbers; `seconds` is what one step took."""
        rate = metrics["tokens/generated"] / max(seconds, 1e-9)
        reward = f"reward {metrics['reward/mean']:.3f}"
        numbers = (
            f"entropy {metrics['entropy']:.3f}  length {metrics['length/mean']:.1f}  {seconds:.2f} s/step  "
            f"{rate:,.0f} tokens/s"
        )
        self._rewards.append(metrics["reward/mean"])
        self._progress.numbers = f"{reward} {sparkline(self._rewards)}  {numbers}"
        self._progress.update(self._task, completed=done)
        every = max(1, self._steps // 20)
        if not self._live and (done <= len(self._rewards) == 1 or done % every == 0):
            self.say(f"step {done:>5}/{self._steps}  {reward}  {numbers}")

    def evaluated(self, done: int, evaluation: Evaluation) -> None:
        """Prints a held-out evaluation."""
        self.say(
            f"step {done:>5}/{self._steps}  {evaluation.problems} held-out problems: "
            f"greedy accuracy {evaluation.accuracy:.3f}, mean reward {evaluation.reward:.3f}"
        )

    def transcripts(self, before: Evaluation, after: Evaluation) -> None:
        """The same held-out problems, answered before and after."""
        self.say("\nHeld-out problems, answered greedily:")
        for old, new in zip(before.transcripts, after.transcripts, strict=True):
            self.say(f"\n  {_line(old['prompt'])}")
            for name, text in (("before", old), ("after", new)):
                self.say(f"    {name:<7}reward {text['reward']:<4g} {_line(text['response'])}")

    def outcome(self, before: Evaluation, after: Evaluation, seconds: float, folder: Path) -> None:
        """The last words."""
        self.say(f"\n{'':<16}{'before':>8}{'after':>8}")
        self.say(f"{'greedy accuracy':<16}{before.accuracy:>8.3f}{after.accuracy:>8.3f}")
        self.say(f"{'mean reward':<16}{before.reward:>8.3f}{after.reward:>8.3f}")
        self.say(f"{seconds:.0f} s of training; everything is in {folder}")


class _Bar(Progress):
    """The bar with a line of numbers under it."""

    numbers = "compiling; the first step takes longest"

    def __init__(self, *, console: Console, disable: bool) -> None:
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=disable,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        bar = self.make_tasks_table(self.tasks)
        yield Group(bar, Text(self.numbers, no_wrap=True, overflow="ellipsis"))


def sparkline(values: list[float], width: int = 16) -> str:
    """The values as bars between 0 and 1 (or the extremes, where those lie outside), averaged to `width` bars."""
    finite = [v for v in values if v == v]
    if not finite:
        return ""
    low, high = min(0.0, *finite), max(1.0, *finite)
    size = max(1, -(-len(finite) // width))
    means = [sum(part) / len(part) for part in (finite[i : i + size] for i in range(0, len(finite), size))]
    return "".join(BARS[round((mean - low) / (high - low) * (len(BARS) - 1))] for mean in means)


def _line(text: str) -> str:
    """Text on one line, long ones shortened in the middle."""
    shown = repr(text)[1:-1]
    return shown if len(shown) <= 160 else f"{shown[:100]} ... {shown[-55:]}"
