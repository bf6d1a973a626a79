"""The hub's record of one session's requests: each ordered one is taken once, and can be answered again.

Ordered requests are numbered without gaps. Unordered ones (from UNORDERED_BASE on) may be repeated
freely; of them only those in work are known. Pure: no sockets, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from messaging.messages import UNORDERED_BASE
from messaging.transport import Buffer

#: All that a step of the most micro-batches can have under way, forwards and backwards, and some.
MOST_REPLIES = 40
MOST_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class New:
    """Not seen before: do it, and `record` the reply."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Done before: send these recorded frames again."""

    frames: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """In work: the reply will come."""


@dataclass(frozen=True, slots=True)
class Stale:
    """Done before, and its reply is no longer kept."""


@dataclass(frozen=True, slots=True)
class Gap:
    """An earlier request is missing; `expected` is the one to send first."""

    expected: int


Admission = New | Replay | Busy | Stale | Gap


class Replies:
    """What one session has asked and been told. `next_request` is the first ordered id to expect."""

    def __init__(self, next_request: int = 1) -> None:
        #: The ordered id to expect next; WELCOME tells it.
        self.next = next_request
        self._in_work: set[int] = set()
        self._kept: OrderedDict[int, tuple[Buffer, ...]] = OrderedDict()
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        """Bytes of the replies that are kept."""
        return self._kept_bytes

    def is_next(self, request: int) -> bool:
        """Whether `admit` would call this request `New`."""
        return request not in self._in_work and (request >= UNORDERED_BASE or request == self.next)

    def admit(self, request: int) -> Admission:
        """What to do about a request that has arrived. After `New` it counts as in work."""
        if request in self._in_work:
            return Busy()
        if request < UNORDERED_BASE:
            if request > self.next:
                return Gap(self.next)
            if request < self.next:
                return Replay(self._kept[request]) if request in self._kept else Stale()
            self.next += 1
        self._in_work.add(request)
        return New()

    def record(self, request: int, frames: Sequence[Buffer]) -> None:
        """The reply to a request in work. It is kept, if ordered, until `ack` or until newer ones need the room.

        The newest is kept whatever its size: without it a lost reply would end the session.
        """
        self._in_work.discard(request)
        if request >= UNORDERED_BASE:
            return
        self._drop(request)
        self._kept[request] = tuple(frames)
        self._kept_bytes += _size(frames)
        while len(self._kept) > MOST_REPLIES or (len(self._kept) > 1 and self._kept_bytes > MOST_BYTES):
            self._drop(next(iter(self._kept)))

    def ack(self, request: int) -> None:
        """The edge has the replies up to this ordered id: they need not be kept."""
        for kept in [kept for kept in self._kept if kept <= request]:
            self._drop(kept)

    def _drop(self, request: int) -> None:
        self._kept_bytes -= _size(self._kept.pop(request, ()))


def _size(frames: Sequence[Buffer]) -> int:
    return sum(len(frame) for frame in frames)
