"""How fast the link is, as transfers see it, and what follows: how much to have under way, and whether to pack."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Transfers are packed below this: 120 Mbit/s. From about 140 on, packing and unpacking take longer than they save.
SLOW_BYTES_PER_S = 15e6
#: So much of the link's time is kept under way; a link of a longer round trip than that is not filled.
_AHEAD_S = 0.5
_LEAST_BYTES, _MOST_BYTES = 2 << 20, 12 << 20
#: However small the pieces are.
_MOST_PIECES = 24
#: How much each piece counts against those before it.
_KEPT = 0.8


class Pace:
    """Bytes per second over the last pieces. One transfer at a time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bytes = 0.0
        self._seconds = 0.0
        self._at = clock()

    def begin(self) -> None:
        """A transfer begins: the time since the last one does not count."""
        self._at = self._clock()

    def arrived(self, count: int) -> None:
        """So many bytes came over the wire."""
        now = self._clock()
        self._bytes = _KEPT * self._bytes + count
        self._seconds = _KEPT * self._seconds + now - self._at
        self._at = now

    @property
    def speed(self) -> float | None:
        """Bytes per second; None before the first piece."""
        return self._bytes / max(self._seconds, 1e-6) if self._bytes else None

    @property
    def slow(self) -> bool:
        """Whether packing pays; a link that is not known yet is taken to be slow."""
        speed = self.speed
        return speed is None or speed < SLOW_BYTES_PER_S

    def more(self, under_way: int, pieces: int) -> bool:
        """Whether to ask for another piece while these are under way. It lets more in as long as that is faster."""
        room = min(_MOST_BYTES, max(_LEAST_BYTES, (self.speed or 0.0) * _AHEAD_S))
        return under_way < room and pieces < _MOST_PIECES
