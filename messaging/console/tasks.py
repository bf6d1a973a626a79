"""What takes more than two seconds, and how far it is: a bar under the live view, a line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from rich.text import Text

from messaging.console.figures import duration, human_bytes, printable
from messaging.console.parts import DIM, STRONG, fit, progress_bar

#: Nothing is said of what is over sooner.
QUIET_S = 2.0
#: The rate is that of so many of these moments.
_SAMPLE_S, _SAMPLES = 0.5, 20
_SHORTEST_BAR, _LONGEST_BAR = 8, 40


@dataclass(frozen=True)
class Figures:
    """Where a task stands, in words; empty where there is nothing to say."""

    amount: str
    rate: str
    left: str
    fraction: float | None


class Task:
    """Something under way: `done` of `total` (None: not known) in `unit`, bytes unless told otherwise.

    Any thread may work on it, and look.
    """

    def __init__(self, title: str, total: float | None, unit: str, clock: Callable[[], float]) -> None:
        self.title = title
        self.total = total
        self._unit = unit
        self._clock = clock
        self._begun = clock()
        self._done = 0.0
        self._found = 0.0
        self._samples: deque[tuple[float, float]] = deque([(self._begun, 0.0)], maxlen=_SAMPLES)
        self._counting = threading.Lock()

    def advance(self, count: float = 1) -> None:
        """So much more is done."""
        with self._counting:
            self._done += count
            now = self._clock()
            if now - self._samples[-1][0] >= _SAMPLE_S:
                self._samples.append((now, self._done))

    def found(self, count: float) -> None:
        """So much was there before; it counts as done, and not for the speed."""
        self._found += count

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._begun

    def figures(self) -> Figures:
        """As of now."""
        at, before = self._samples[0]
        passed = self._clock() - at
        rate = (self._done - before) / passed if passed > 0 else 0.0
        done = self._done + self._found
        if not self.total:
            return Figures(self._count(done) if done else f"{duration(self.seconds)} so far", "", "", None)
        left = max(0.0, self.total - done) / rate if rate > 0 else None
        return Figures(
            amount=f"{self._number(done)} of {self._count(self.total)}",
            rate=f"{self._number(rate)}/s" if rate > 0 and self._unit == "bytes" else "",
            left="" if left is None else f"{duration(left)} left",
            fraction=min(1.0, done / self.total),
        )

    def _count(self, value: float) -> str:
        return human_bytes(value) if self._unit == "bytes" else f"{value:,.0f} {self._unit}"

    def _number(self, value: float) -> str:
        return human_bytes(value) if self._unit == "bytes" else f"{value:,.0f}"

    def line(self) -> str:
        """All of it on one line: 'fetching blocks: 120 MiB of 480 MiB, 9.8 MiB/s, 37 s left'."""
        figures = self.figures()
        return f"{self.title}: " + ", ".join(filter(None, (figures.amount, figures.rate, figures.left)))

    def bar(self, width: int) -> Text:
        """All of it on one line of a terminal, with a bar where the total is known."""
        figures = self.figures()
        words = Text("  ").append(printable(self.title), STRONG)
        after = Text()
        for part in filter(None, (figures.amount, figures.rate, figures.left)):
            after.append("  ").append(part, DIM if part is figures.left else "")
        room = width - words.cell_len - after.cell_len - 1
        if figures.fraction is not None and room >= _SHORTEST_BAR:
            words.append(" ").append_text(progress_bar(figures.fraction, 1.0, min(room, _LONGEST_BAR)))
        return fit(words.append_text(after), width)


class Tasks:
    """What is under way now. Any thread may begin and end."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._running: list[Task] = []
        self._lock = threading.Lock()

    def begin(self, title: str, total: float | None, unit: str) -> Task:
        """Another one."""
        task = Task(title, total, unit, self._clock)
        with self._lock:
            self._running.append(task)
        return task

    def end(self, task: Task) -> None:
        """It is over."""
        with self._lock:
            self._running.remove(task)

    def shown(self) -> Task | None:
        """The one begun last among those that take long; None where nothing does."""
        with self._lock:
            long = [task for task in self._running if task.seconds >= QUIET_S]
        return long[-1] if long else None


class TaskLines:
    """Says when another line about the tasks is due."""

    def __init__(self, tasks: Tasks, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._tasks = tasks
        self._every_s = every_s
        self._clock = clock
        self._about: Task | None = None
        self._next_s = 0.0

    def due(self) -> str | None:
        """The line, or None: one when a task turns out to be long, then one each `every_s` seconds."""
        task, now = self._tasks.shown(), self._clock()
        if task is None or (task is self._about and now < self._next_s):
            return None
        self._about, self._next_s = task, now + self._every_s
        return task.line()
