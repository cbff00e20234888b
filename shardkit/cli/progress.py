"""Progress of long commands: a bar with rows/s on a terminal, a plain line now and then elsewhere.

The time left is shown only once it is credible: after a while, with a part of the work done, at a steady pace.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.table import Column
from rich.text import Text

#: Seconds over which the pace is measured.
WINDOW = 10.0
#: Before this many seconds, and this share of the work, nobody can tell how long it takes.
CREDIBLE_SECONDS = 3.0
CREDIBLE_SHARE = 0.02
#: The pace of the window's two halves may differ by this factor.
STEADY = 1.5
#: Cells of a bar.
BAR = 24
#: Seconds between two plain lines of one task.
LINE_SECONDS = 5.0


class Pace:
    """Rate and time left from what was done when. No clock of its own.

    :param total: how much there is to do; None where nobody knows.
    :param start: seconds on the caller's clock.
    """

    def __init__(self, total: int | None, start: float) -> None:
        self.total = total
        self.done = 0
        self._start = start
        self._samples: deque[tuple[float, int]] = deque([(start, 0)])

    def record(self, now: float, done: int) -> None:
        """``done`` is all that has been done by ``now``."""
        self.done = done
        last = self._samples[-1][0]
        if len(self._samples) > 1 and now - last < WINDOW / 50:
            self._samples[-1] = (last, done)
        else:
            self._samples.append((now, done))
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()

    def rate(self, now: float) -> float | None:
        """Units a second over the last seconds; None before there is anything to tell."""
        since, before = self._samples[0]
        elapsed = now - since
        return (self.done - before) / elapsed if elapsed >= 0.5 and self.done > before else None

    def average(self, now: float) -> float:
        """Units a second since the start."""
        return self.done / max(now - self._start, 1e-9)

    def seconds_left(self, now: float) -> float | None:
        """The time left where it is credible."""
        rate = self.rate(now)
        if (
            self.total is None
            or rate is None
            or now - self._start < CREDIBLE_SECONDS
            or self.done < self.total * CREDIBLE_SHARE
            or not self._steady(now)
        ):
            return None
        return max(self.total - self.done, 0) / rate

    def _steady(self, now: float) -> bool:
        first_time, first_done = self._samples[0]
        middle_time, middle_done = min(self._samples, key=lambda sample: abs(sample[0] - (first_time + now) / 2))
        if middle_time <= first_time or now <= middle_time:
            return False
        early = (middle_done - first_done) / (middle_time - first_time)
        late = (self.done - middle_done) / (now - middle_time)
        return min(early, late) * STEADY >= max(early, late) > 0


class Task:
    """One thing in progress. May be advanced from any thread."""

    def __init__(self, owner: Progress, label: str, total: int | None, unit: str) -> None:
        self._owner = owner
        self._lock = threading.Lock()
        self.label = label
        self.unit = unit
        self.started = owner.clock()
        self.pace = Pace(total, self.started)
        self.last_line = self.started
        self.finished_at: float | None = None

    @property
    def finished(self) -> bool:
        """Whether it is done."""
        return self.finished_at is not None

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        with self._lock:
            self.pace.record(self._owner.clock(), self.pace.done + amount)
        self._owner.changed(self)

    def at(self, done: int) -> None:
        """So much is done in all: where a resumed job starts, or a counter that somebody else keeps."""
        with self._lock:
            self.pace.record(self._owner.clock(), done)
        self._owner.changed(self)

    def expect(self, total: int) -> None:
        """There turns out to be so much to do."""
        self.pace.total = total
        self._owner.changed(self)

    def describe(self, label: str) -> None:
        """Say something else about it."""
        self.label = label
        self._owner.changed(self)

    def finish(self, label: str | None = None) -> None:
        """It is done."""
        self.label = label or self.label
        self.finished_at = self._owner.clock()
        self._owner.changed(self)

    @property
    def amount(self) -> str:
        """``120,000 of 336,776 rows (35%)``"""
        total = self.pace.total
        if not total:
            return f"{self.pace.done:,} {self.unit}"
        share = min(self.pace.done * 100 // total, 100)
        return f"{self.pace.done:,} of {total:,} {self.unit} ({share}%)"

    def speed(self, now: float) -> str:
        """``41,200 rows/s, 12 s left``, as much of it as is known."""
        if self.finished_at is not None:
            took = self.finished_at - self.started
            average = self._rate(self.pace.average(self.finished_at) if took >= 0.5 else None)
            return ", ".join(part for part in (f"in {duration(took)}", average) if part)
        left = self.pace.seconds_left(now)
        parts = (self._rate(self.pace.rate(now)), "" if left is None else f"{duration(left)} left")
        return ", ".join(part for part in parts if part)

    def figures(self, now: float, *, speed: bool) -> str:
        """What stands beside the bar."""
        amount = self.amount if self.pace.done or self.pace.total else ""
        return "  ".join(part for part in (amount, self.speed(now) if speed else "") if part)

    def _rate(self, rate: float | None) -> str:
        """Empty below one a second: steps are not rows."""
        return "" if rate is None or rate < 1 else f"{rate:,.0f} {self.unit}/s"


class Progress:
    """Tasks in progress, as a context manager. Nothing is drawn before the first one: until then a command may ask.

    :param console: where to draw; bars where it is a terminal, else plain lines.
    :param clock: seconds, for tests.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._console = console
        self._lock = threading.Lock()
        self._bars: dict[Task, TaskID] = {}
        self._drawing: RichProgress | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._drawing = RichProgress(
                SpinnerColumn(finished_text="[green]✓"),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                _Bar(self),
                _Figures(self),
                console=self._console,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._drawing is not None:
            self._drawing.stop()

    def task(self, label: str, *, total: int | None = None, unit: str = "rows") -> Task:
        """Begin something.

        :param total: how much there is to do, in ``unit``; None where nobody knows.
        """
        task = Task(self, label, total, unit)
        if self._drawing is not None:
            self._drawing.start()
            bar = self._drawing.add_task(label, total=total, figures=task)
            with self._lock:
                self._bars[task] = bar
        return task

    def line(self, text: str) -> None:
        """A line above the bars."""
        self._console.print(Text(text), soft_wrap=not self._console.is_terminal)

    def fits(self, *, bar: bool, speed: bool) -> bool:
        """Whether every task has room on one line, drawn with these."""
        with self._lock:
            tasks = list(self._bars)
        label = max((cell_len(task.label) for task in tasks), default=0)
        figures = max((cell_len(task.figures(self.clock(), speed=speed)) for task in tasks), default=0)
        spinner, gaps = 1, 3  # columns are one space apart
        return spinner + label + (BAR if bar else 0) + figures + gaps <= self._console.width

    def changed(self, task: Task) -> None:
        """Draw a task again; called by the task."""
        if self._drawing is not None:
            total = task.pace.total
            if task.finished and total is None:
                total = max(task.pace.done, 1)
            self._drawing.update(
                self._bars[task],
                description=task.label,
                total=total,
                completed=total if task.finished else task.pace.done,
            )
            return
        now = self.clock()
        with self._lock:
            due = task.finished or now - task.last_line >= LINE_SECONDS
            if due:
                task.last_line = now
        if due:
            speed = task.speed(now)
            amount = f": {task.amount}" if task.pace.done or task.pace.total else ""
            self.line(f"{task.label}{amount}{',' if amount and speed else ''} {speed}".rstrip())


class _Bar(BarColumn):
    """A bar where there is room beside the figures, which say more."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(bar_width=BAR)
        self._progress = progress

    def render(self, task: RichTask) -> Any:
        return super().render(task) if self._progress.fits(bar=True, speed=True) else Text()


class _Figures(ProgressColumn):
    """Amount, and pace and time left where there is room."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self._progress = progress

    def render(self, task: RichTask) -> Text:
        figures: Task = task.fields["figures"]
        speed = self._progress.fits(bar=False, speed=True)
        return Text(figures.figures(self._progress.clock(), speed=speed), style="cyan")


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_rest = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_rest} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
