"""When to ping the hub, and when to believe it dead. Pure: the time is handed in, in seconds."""

from __future__ import annotations

import math
import random

_SHORTEST_S = 5.0
_MISSES = 3
_QUIET_PINGS = 2
#: How much later than expected a ping may come before it counts as missed.
_LATE_S = 1.0


def interval_s(edges: int) -> float:
    """Seconds between an edge's pings, at most, with so many edges at the hub."""
    return max(_SHORTEST_S, edges / 200 + 1)


def quiet_s(edges: int) -> float:
    """Seconds without a sign of life that are odd, with so many edges at the hub."""
    return _QUIET_PINGS * interval_s(edges)


def edge_silent_s(edges: int) -> float:
    """Seconds after which a hub with so many edges calls one of them silent: its pings, the last but just missed."""
    return _MISSES * interval_s(edges) + _LATE_S


class Liveness:
    """Pings about every max(5, n / 200 + 1) s for n edges; any traffic counts; three misses are a death."""

    def __init__(self, rng: random.Random, now: float) -> None:
        self._rng = rng
        #: The interval that the pings keep below; the jitter spreads a thousand edges over it.
        self._interval = _SHORTEST_S
        self._next_ping = now
        #: Pings since anything was heard, and when the last one that may be missed is missed.
        self._unanswered = 0
        self._dead_at = math.inf

    @property
    def quiet_s(self) -> float:
        """Seconds without a sign of life from which on the hub is called silent: two pings' answers are missing."""
        return _QUIET_PINGS * self._interval

    def resize(self, edges: int) -> None:
        """The hub has `edges` edges now (its Pong says so)."""
        self._interval = interval_s(edges)

    def heard(self) -> None:
        """Something came from the hub, whatever it was."""
        self._unanswered = 0
        self._dead_at = math.inf

    def restart(self, now: float) -> None:
        """A new connection: what was missed on the old one no longer counts."""
        self.heard()
        self._next_ping = now

    def ping_due(self, now: float) -> bool:
        """Whether to send a ping now; say so with `pinged`."""
        return now >= self._next_ping

    def pinged(self, now: float) -> None:
        """A ping was sent, or could not be sent: both count when nothing comes back."""
        self._next_ping = now + self._interval * self._rng.uniform(0.75, 1.0)
        self._unanswered += 1
        if self._unanswered == _MISSES:
            self._dead_at = self._next_ping

    def dead(self, now: float) -> bool:
        """Whether three pings in a row brought no sign of life."""
        return now >= self._dead_at

    def next_event(self) -> float:
        """The time at which to look again."""
        return self._next_ping
