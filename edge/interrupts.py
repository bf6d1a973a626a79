"""Ctrl-C and SIGTERM, held back while something is done that must be done whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from messaging.commands import Terminated

#: How long an interrupt waits for the end of what it would break.
_PATIENCE_S = 5


class Interrupts:
    """A context manager, for the main thread: Ctrl-C raises KeyboardInterrupt in it, and SIGTERM Terminated."""

    def __init__(self) -> None:
        self._holding = False
        self._held: KeyboardInterrupt | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.alarm(0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What is done in here is not interrupted, unless it takes seconds, or the user insists."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
            signal.alarm(0)
        if self._held is not None:
            held, self._held = self._held, None
            raise held

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGALRM:
            if self._held is not None:
                raise self._held
            return
        interrupt = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if not self._holding or self._held is not None:
            raise interrupt
        self._held = interrupt
        signal.alarm(_PATIENCE_S)
