"""What happened, in lines with the time before them. Any thread may write and read."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from messaging.console.figures import duration, printable
from messaging.console.tasks import QUIET_S, Task, Tasks

Echo = Callable[[str], None]


class Journal:
    """The last lines logged, and an echo that gets every line at once.

    Lines logged before there is an echo wait for it, as far as they are kept.
    """

    def __init__(self, clock: Callable[[], float] = time.time, keep: int = 100) -> None:
        self._clock = clock
        self._lines: deque[str] = deque(maxlen=keep)
        self._waiting: deque[str] = deque(maxlen=keep)
        self._echo: Echo | None = None
        #: what is under way, for whoever shows it
        self.tasks = Tasks()
        # Reentrant: an echo that fails logs that it failed.
        self._lock = threading.RLock()

    def log(self, message: str) -> None:
        """Add one line: `HH:MM:SS message`."""
        line = self.stamp(message)
        with self._lock:
            self._lines.append(line)
            if self._echo is None:
                self._waiting.append(line)
            else:
                self._echo(line)

    @contextmanager
    def task(self, title: str, total: float | None = None, unit: str = "bytes") -> Iterator[Task]:
        """Do something that may take long; how far it is shows after two seconds, and one line says when it is done."""
        task = self.tasks.begin(title, total, unit)
        try:
            yield task
            if task.seconds >= QUIET_S:
                self.log(f"{title}: done in {duration(task.seconds)}")
        finally:
            self.tasks.end(task)

    def stamp(self, message: str) -> str:
        """The message on one line, after the time."""
        return f"{time.strftime('%H:%M:%S', time.localtime(self._clock()))} {printable(message)}"

    def recent(self) -> tuple[str, ...]:
        """The lines kept, oldest first."""
        with self._lock:
            return tuple(self._lines)

    def echo_to(self, echo: Echo) -> None:
        """Send every line to `echo` from now on, those that waited for one first."""
        with self._lock:
            self._echo = echo
            while self._waiting:
                echo(self._waiting.popleft())
