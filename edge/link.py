"""What an edge knows of its link, and how it says so when the hub is silent or does not get on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import messaging.messages as m
from messaging.console import Journal
from messaging.console.figures import duration

#: Each time that trouble has lasted this much longer it is told again, but at least once in an hour.
_LONGER, _AGAIN_S = 4.0, 3600.0


@dataclass
class LinkFigures:
    """What the edge's screen shows of the link; written by the network thread alone."""

    round_trip_s: float | None = None
    heard_at: float = 0.0
    #: what the hub said of itself last, and when
    pong: m.Pong | None = None
    pong_at: float = 0.0
    connected: bool = False
    round_trips: int = 0


class _Trouble:
    """One kind of trouble: told when it begins, again as it lasts, and when it is over."""

    def __init__(self, journal: Journal, says: Callable[[float], str], over: str) -> None:
        self._journal = journal
        self._says, self._over = says, over
        self._lasted = 0.0
        self._tell_at: float | None = None

    def look(self, seconds: float) -> None:
        """It has lasted so long; 0: there is none."""
        if not seconds:
            if self._tell_at is not None:
                self._journal.log(f"{self._over} after {duration(self._lasted)}")
            self._tell_at = None
        elif self._tell_at is None or seconds >= self._tell_at:
            self._journal.log(self._says(seconds))
            self._tell_at = min(seconds * _LONGER, seconds + _AGAIN_S)
        self._lasted = seconds


class LinkWatch:
    """Tells the journal and the screen of a silent hub and of one whose computation does not get on."""

    def __init__(self, journal: Journal, figures: LinkFigures, clock: Callable[[], float]) -> None:
        self._figures = figures
        self._clock = clock
        self._quiet_s = 0.0
        self._silence = _Trouble(journal, _silent, "the hub answers again")
        self._stuck = _Trouble(journal, _stuck, "the hub's computation goes on")

    def look(self, quiet_s: float) -> None:
        """Called again and again by the network thread. A hub is silent after `quiet_s` seconds without a sign."""
        self._quiet_s = quiet_s
        self._silence.look(self.silent_s())
        if not self.silent_s():
            self._stuck.look(self.stuck_s())

    def silent_s(self) -> float:
        """How long the hub has been silent; 0 if it is not."""
        seconds = self._clock() - self._figures.heard_at
        return seconds if seconds > self._quiet_s > 0 else 0.0

    def stuck_s(self) -> float:
        """How long the hub has been at one computation, if it says that this is unusual; else 0."""
        pong = self._figures.pong
        return pong.busy_s + self._clock() - self._figures.pong_at if pong is not None and pong.busy_s else 0.0

    @property
    def trouble(self) -> str:
        """What is wrong now, in words for the screen; empty when all is well. For any thread."""
        if silent := self.silent_s():
            return _silent(silent)
        stuck = self.stuck_s()
        return _stuck(stuck) if stuck else ""


def _silent(seconds: float) -> str:
    return f"hub silent for {duration(seconds)}, retrying"


def _stuck(seconds: float) -> str:
    return f"hub busy with one computation for {duration(seconds)}"
