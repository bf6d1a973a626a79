"""Who was let in, who was not and why: a log that is only ever added to.

    audit.jsonl      one JSON object per line: time (UTC), event, and what is known of name, key (public),
                     address, reason, and `count` where many alike were put into one line
    audit.jsonl.1    the lines before, and so on up to .5, the oldest

Tokens and secret keys are never in it; an invitation is named by the first characters of its token's sha256.
A line is in the kernel's hands when `write` returns: it outlives a kill -9, and a power cut at most takes the
last seconds.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

MOST_BYTES = 10 << 20
KEPT = 5
#: Of what a peer can bring about at will, so many lines alike are written in so many seconds; the rest is counted.
BURST = 20
WINDOW_S = 60.0
#: A line holds no more of any text than this; names and reasons come from the other side of the wire.
_MOST_TEXT = 300


@dataclass
class _Window:
    """What was written and what was only counted of one kind of event since `begun`."""

    begun: float
    written: int = 0
    counted: int = 0


class AuditLog:
    """Every method may be called from any thread, and several processes may write to one log.

    A disk that fails is told to `tell`, once until it works again, and stops nobody.
    """

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        most_bytes: int = MOST_BYTES,
        kept: int = KEPT,
    ) -> None:
        self.path = path
        #: where a failing disk is told; whoever has a screen puts it here
        self.tell: Callable[[str], None] = lambda text: None
        self._clock = clock
        self._most_bytes = most_bytes
        self._kept = kept
        self._lock = threading.Lock()
        self._windows: dict[tuple[str, str], _Window] = {}
        self._failing = False

    def write(self, event: str, *, name: str = "", key: str = "", address: str = "", reason: str = "") -> None:
        """Add a line about something that the hub or its owner did."""
        facts = {"name": name, "key": key, "address": address, "reason": reason}
        with self._lock:
            self._append(event, {fact: text[:_MOST_TEXT] for fact, text in facts.items() if text})

    def write_often(
        self, event: str, *, group: str = "", name: str = "", key: str = "", address: str = "", reason: str = ""
    ) -> None:
        """Add a line about what a peer can bring about at will: of many alike, most are only counted.

        Events of one name and `group` are alike; a group is never chosen by strangers.
        """
        facts = {"name": name, "key": key, "address": address, "reason": reason}
        with self._lock:
            self._end_window(event, group)
            window = self._windows.setdefault((event, group), _Window(self._clock()))
            if window.written >= BURST:
                window.counted += 1
                return
            window.written += 1
            self._append(event, {fact: text[:_MOST_TEXT] for fact, text in facts.items() if text})

    def flush(self, everything: bool = False) -> None:
        """Write what was only counted, where its time is over. To be called now and then."""
        with self._lock:
            # The first in the dictionary began first: as long as its time is not over, no other's is.
            while self._windows and self._end_window(*next(iter(self._windows)), everything):
                pass

    def last(self, count: int) -> list[dict[str, Any]]:
        """The last `count` lines, oldest first. Lines that cannot be read are left out."""
        newest = list(islice(self._backwards(), count))
        return newest[::-1]

    def _backwards(self) -> Iterator[dict[str, Any]]:
        for number in range(self._kept + 1):
            try:
                lines = self._numbered(number).read_bytes().splitlines()
            except OSError:
                continue
            for line in reversed(lines):
                try:
                    fields = json.loads(line)
                except ValueError:
                    continue
                if isinstance(fields, dict):
                    yield fields

    def _end_window(self, event: str, group: str, at_once: bool = False) -> bool:
        """Say what was only counted, if the time for that is over; whether it is."""
        window, now = self._windows.get((event, group)), self._clock()
        if window is None or (0 <= now - window.begun < WINDOW_S and not at_once):
            return False
        del self._windows[event, group]
        if window.counted:
            facts = {"key": group} if group else {}
            reason = f"as many more within {now - window.begun:.0f} s"
            self._append(event, {**facts, "reason": reason, "count": window.counted})
        return True

    def _append(self, event: str, facts: dict[str, Any]) -> None:
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        # After a failure the file may end in half a line.
        line = b"\n" * self._failing + json.dumps({"time": at, "event": event, **facts}).encode() + b"\n"
        try:
            with self._held():
                self._make_room()
                # Opened for each line: another process may have begun a new file since the last one.
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
                try:
                    if os.write(descriptor, line) != len(line):
                        raise OSError(0, "the line was cut short")
                finally:
                    os.close(descriptor)
        except OSError as error:
            if not self._failing:
                self._failing = True
                self.tell(f"ALARM: the audit log {self.path} cannot be written ({error.strerror}); the work goes on")
        else:
            if self._failing:
                self.tell("the audit log is written again; what happened in between is not in it")
            self._failing = False

    def _make_room(self) -> None:
        """Begin a new file where this one is full."""
        try:
            full = self.path.stat().st_size >= self._most_bytes
        except FileNotFoundError:
            return
        if full:
            for number in range(self._kept, 0, -1):
                if self._numbered(number - 1).exists():
                    os.replace(self._numbered(number - 1), self._numbered(number))

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    @contextmanager
    def _held(self) -> Iterator[None]:
        """One process at a time: two that make room at once would throw a file away."""
        descriptor = os.open(self.path.with_name("audit.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
