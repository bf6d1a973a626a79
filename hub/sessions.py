"""The hub's sessions: who they belong to, where they can be answered, what is known of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hub.jobs import Place
from messaging.messages import Ping
from messaging.replies import Replies
from messaging.transport import Route


@dataclass
class Reception:
    """An adapter file on its way in, piece by piece, in order."""

    round: int
    total: int
    sha256: str
    data: bytearray = field(default_factory=bytearray)


@dataclass
class Session:
    """One edge's session. Its key is its owner: every message is held against it."""

    number: int
    key: str
    name: str
    train: bool
    partition: tuple[int, int]
    place: Place
    #: adapter version that its generation uses, pinned when it opened; None while it trains
    version: int | None
    replies: Replies
    heard_at: float
    #: when the hub owed it an answer last: an edge that waits for the hub is not silent
    owed_at: float = -math.inf
    #: bytes of requests in work
    outstanding: int = 0
    silent: bool = False
    #: what its last Ping said
    ping: Ping | None = None
    reception: Reception | None = None
    #: where each request in work wants its answer, and its size
    routes: dict[int, tuple[Route, int]] = field(default_factory=dict)
    #: steps that B's optimizer has applied
    applied: int = 0


class Sessions:
    """All open sessions, by number."""

    def __init__(self, epoch: int) -> None:
        # Numbers never repeat across restarts, so an old session's message can never reach a new one.
        self._next = epoch * (1 << 20) + 1
        self._by_number: dict[int, Session] = {}

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    def number(self) -> int:
        """A fresh session number."""
        self._next += 1
        return self._next - 1

    def add(self, session: Session) -> None:
        """Open it."""
        self._by_number[session.number] = session

    def get(self, number: int, key: str) -> Session | None:
        """The session, if it is open and belongs to `key`."""
        session = self._by_number.get(number)
        return session if session is not None and session.key == key else None

    def find(self, number: int) -> Session | None:
        """The session, whoever owns it (for answers, whose addressee was checked when they were asked)."""
        return self._by_number.get(number)

    def of_key(self, key: str) -> list[Session]:
        """All open sessions of an edge."""
        return [session for session in self if session.key == key]

    def remove(self, number: int) -> None:
        """Close it."""
        self._by_number.pop(number, None)

    def pinned(self) -> set[int]:
        """Adapter versions that are in use."""
        return {session.version for session in self if session.version is not None}
