"""Shows a snapshot twice a second on a terminal; elsewhere prints plain lines.

    journal = Journal()
    with LiveView(take_snapshot, VIEW, journal):
        journal.log("fetching blocks")
        ...

Enter it before the first slow thing, so that the user sees what is going on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, TextIO, TypeVar

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.padding import Padding

from messaging.console.dump import write_snapshot
from messaging.console.journal import Journal
from messaging.console.tasks import TaskLines

S = TypeVar("S")
S_contra = TypeVar("S_contra", contravariant=True)

#: How long leaving waits for a snapshot that is being taken.
_LAST_SNAPSHOT_S = 2.0


@dataclass(frozen=True)
class View(Generic[S]):
    """How one kind of snapshot looks. Pure functions."""

    #: Snapshot, terminal width, lines that may be used.
    render: Callable[[S, int, int], RenderableType]
    plain_line: Callable[[S], str]
    #: What must change before another plain line is worth printing.
    progress: Callable[[S], object]


class _Display(Protocol[S_contra]):
    def show(self, snapshot: S_contra) -> None: ...

    def close(self) -> None: ...


class LiveView(Generic[S]):
    """A context manager; a background thread takes a snapshot every `period_s` and shows it.

    `snapshot` is called from that thread and must be quick. A failing view never ends the work that it
    shows: the terminal is restored, the journal says why, and log lines go on.
    """

    def __init__(
        self,
        snapshot: Callable[[], S],
        view: View[S],
        journal: Journal,
        *,
        console: Console | None = None,
        headless: bool = False,
        period_s: float = 0.5,
        plain_every_s: float = 5.0,
        dump: Path | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._journal = journal
        self._period_s = period_s
        self._dump = dump
        self._printer = _Printer(console or Console())
        self._display: _Display[S]
        if headless or not _can_show(self._printer.console):
            self._display = _Lines(self._printer, view, journal, plain_every_s)
        else:
            self._display = _Screen(self._printer, view, journal)
        self._showing = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="live-view", daemon=True)

    def log(self, message: str) -> None:
        """Add a line to the journal: shown in the view, or printed at once where there is none."""
        self._journal.log(message)

    def __enter__(self) -> LiveView[S]:
        try:
            self._tick()
            self._thread.start()
        except BaseException:
            self._display.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        try:
            self._thread.join(_LAST_SNAPSHOT_S)
            if not self._thread.is_alive():
                self._tick()
        finally:
            # The view must not end the work: a terminal that is gone has nothing to restore.
            with suppress(Exception):
                self._display.close()

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self._tick()

    def _tick(self) -> None:
        try:
            snapshot = self._snapshot()
            self._write_dump(snapshot)
            if self._showing:
                self._display.show(snapshot)
        except Exception as error:
            self._stop_showing(error)

    def _stop_showing(self, error: Exception) -> None:
        """Give the terminal back, and say why, once; the dump goes on."""
        if not self._showing:
            return
        self._showing = False
        with suppress(Exception):
            self._display.close()
        self._journal.log(f"the live view stopped ({error!r}); the work and these lines go on")

    def _write_dump(self, snapshot: S) -> None:
        if self._dump is None:
            return
        try:
            write_snapshot(self._dump, snapshot)
        except OSError as error:
            self._journal.log(f"no status can be written to {self._dump}: {error}")
            self._dump = None


@contextmanager
def plain_lines(journal: Journal, file: TextIO, every_s: float = 5.0) -> Iterator[None]:
    """Print the journal's lines to `file` at once, and how far long tasks are; for commands without a view."""
    printer = _Printer(Console(file=file))
    lines, stop = TaskLines(journal.tasks, every_s), threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            if (line := lines.due()) is not None:
                printer.line(journal.stamp(line))

    journal.echo_to(printer.line)
    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Printer:
    """Whole lines to the console's file, at once; silent when nobody can read them any more."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # Reentrant: a signal handler may log in the middle of a line.
        self._lock = threading.RLock()

    def line(self, text: str) -> None:
        file = self.console.file
        encoding = getattr(file, "encoding", None) or "utf-8"
        safe = text.encode(encoding, "backslashreplace").decode(encoding)
        # A closed pipe or a terminal that is gone must not end a training run.
        with self._lock, suppress(OSError, ValueError):
            file.write(safe + "\n")
            file.flush()


class _Lines(Generic[S]):
    """Plain lines: the journal's at once, progress when there is some, at most every so often."""

    def __init__(self, printer: _Printer, view: View[S], journal: Journal, every_s: float) -> None:
        self._printer = printer
        self._view = view
        self._journal = journal
        self._every_s = every_s
        self._tasks = TaskLines(journal.tasks, every_s)
        self._started = False
        self._shown: object = None
        self._next_s = 0.0
        self._last: S | None = None

    def show(self, snapshot: S) -> None:
        if not self._started:
            self._started = True
            self._shown = self._view.progress(snapshot)
            self._journal.echo_to(self._printer.line)
        self._last = snapshot
        if (line := self._tasks.due()) is not None:
            self._printer.line(self._journal.stamp(line))
        if time.monotonic() >= self._next_s:
            self._print_progress()

    def close(self) -> None:
        self._journal.echo_to(self._printer.line)
        self._print_progress()

    def _print_progress(self) -> None:
        if self._last is None or self._view.progress(self._last) == self._shown:
            return
        self._shown = self._view.progress(self._last)
        self._next_s = time.monotonic() + self._every_s
        self._printer.line(self._journal.stamp(self._view.plain_line(self._last)))


class _Screen(Generic[S]):
    """The view drawn in place; its last state stays on the terminal."""

    def __init__(self, printer: _Printer, view: View[S], journal: Journal) -> None:
        self._printer = printer
        self._view = view
        self._journal = journal
        self._size = printer.console.size
        self._live = Live(console=printer.console, auto_refresh=False)

    def show(self, snapshot: S) -> None:
        console = self._printer.console
        if not self._live.is_started:
            # The view shows the journal's lines itself.
            self._journal.echo_to(lambda line: None)
            self._live.start()
        if console.size != self._size:
            # The terminal has wrapped the old lines anew, so that nobody knows where they are: start on an empty one.
            self._size = console.size
            console.control(Control.clear(), Control.home())
        self._live.update(self._drawn(snapshot), refresh=True)

    def _drawn(self, snapshot: S) -> RenderableType:
        """The view, and under it how far the task is that takes long just now."""
        width, height = self._size
        task = self._journal.tasks.shown()
        # One line stays free for the prompt that comes after.
        if task is None:
            return self._view.render(snapshot, width, height - 1)
        # A view may end without a line break; with the padding around it, it cannot.
        return Group(Padding(self._view.render(snapshot, width, height - 2), 0), task.bar(width))

    def close(self) -> None:
        try:
            self._live.stop()
        finally:
            self._journal.echo_to(self._printer.line)


def _can_show(console: Console) -> bool:
    """Whether the console can draw in place, in characters of our choice.

    The file itself is asked too: FORCE_COLOR makes rich take a log file for a terminal.
    """
    return console.is_interactive and console.file.isatty() and console.encoding.lower().startswith("utf")
