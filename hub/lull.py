"""When a hub may let pings gather, instead of waking for each: while many edges have nothing else to say."""

from __future__ import annotations

from collections.abc import Callable

#: With fewer sessions than this there are too few pings for it to matter.
_CROWD = 200
#: How long nothing but pings must have come, and how long they then gather. An edge that begins to work is answered
#: so much later, once; a ping taken together with others costs a third of one taken alone.
_CALM_S, _REST_S = 1.0, 0.05


class Lull:
    """For the loop's thread alone. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._disturbed_at = clock()

    def disturb(self) -> None:
        """There was something else than a ping."""
        self._disturbed_at = self._clock()

    def rest_s(self, sessions: int) -> float:
        """How long to leave alone what arrives, in seconds; 0 as a rule."""
        calm = sessions >= _CROWD and self._clock() - self._disturbed_at >= _CALM_S
        return _REST_S if calm else 0.0
