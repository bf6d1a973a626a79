"""What a process writes down of itself: which function ran from when to when, in which thread.

Functions are wrapped from outside, so the product knows nothing of it. The clock is the machine's monotonic one,
the same in all its processes.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The label of what only waits: it is transparent, whatever runs meanwhile is what takes the time.
WAITING = ""


@dataclass(frozen=True)
class Span:
    """One call: its label, the thread that it ran in, its begin and end in nanoseconds."""

    label: str
    thread: str
    begin: int
    end: int


class Recorder:
    """Collects the spans of a process. Any thread may run what is wrapped."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, int, int, int]] = []
        self._threads: dict[int, str] = {}

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its calls written down under `label`."""
        calls, threads = self._calls, self._threads
        ident, clock = threading.get_ident, time.monotonic_ns

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            thread, begin = ident(), clock()
            if thread not in threads:
                threads[thread] = threading.current_thread().name
            try:
                return function(*args, **kwargs)
            finally:
                calls.append((label, thread, begin, clock()))

        return run

    def wrap(self, owner: Any, name: str, label: str) -> None:
        """Replace `owner.name`, a function of a class, a module or an object, by itself with its calls written down."""
        setattr(owner, name, self.timed(label, getattr(owner, name)))

    def spans(self) -> list[Span]:
        """All calls so far, in the order of their ends."""
        return [Span(label, self._threads[thread], begin, end) for label, thread, begin, end in self._calls]

    def write(self, path: Path) -> None:
        """All calls so far, as JSON."""
        path.write_text(json.dumps([(span.label, span.thread, span.begin, span.end) for span in self.spans()]))


def read(path: Path) -> list[Span]:
    """What `Recorder.write` wrote."""
    return [Span(*fields) for fields in json.loads(path.read_text())]


def labelled(spans: Iterable[Span], label: str) -> list[Span]:
    """Those under `label`, the earliest first."""
    return sorted((span for span in spans if span.label == label), key=lambda span: span.begin)
