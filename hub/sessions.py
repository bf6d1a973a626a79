"""The hub's sessions: who they belong to, where they can be answered, what is known of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from hub.credits import Account, Credits
from hub.jobs import Place
from messaging.errors import ErrorCode, HubError
from messaging.messages import Ping
from messaging.replies import Replies
from messaging.transport import Route

#: Sessions that generate which one edge may have at a time.
MOST_GENERATING = 64


@dataclass
class Session:
    """One edge's session. Its key is its owner: every message is held against it.

    `number` is what crosses the wire; a new process of the edge gets a new one, so that nothing the old process sent
    is taken for its own. `seat` is what scheduler and engine know it by; a training edge keeps its seat over that.
    """

    number: int
    seat: int
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
    #: bytes of its requests in work and of the answers kept for it
    account: Account = field(default_factory=Account)
    silent: bool = False
    #: what its last Ping said
    ping: Ping | None = None
    #: where each request in work wants its answer, and its size
    routes: dict[int, tuple[Route, int]] = field(default_factory=dict)
    #: steps that B's optimizer has applied
    applied: int = 0
    #: step and micro-batch whose forward was not asked for yet; below this it is asked again
    forwarded: tuple[int, int] = (0, 0)
    #: the group whose replica serves it
    group: int = 0


class Sessions:
    """All open sessions, by number."""

    def __init__(self, epoch: int, credits: Credits) -> None:
        # Numbers never repeat across restarts, so an old session's message can never reach a new one.
        self._next = epoch * (1 << 20) + 1
        self._by_number: dict[int, Session] = {}
        self._by_seat: dict[int, Session] = {}
        self._credits = credits
        #: open sessions that generate, of each key
        self._generating: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_number.values()))

    def __len__(self) -> int:
        return len(self._by_number)

    def number(self) -> int:
        """A fresh session number."""
        self._next += 1
        return self._next - 1

    def add(self, session: Session) -> None:
        """Open it. HubError if the hub has room for no more, or this edge has too many that generate."""
        if not session.train and self._generating[session.key] >= MOST_GENERATING:
            text = f"this edge has {MOST_GENERATING} sessions at the hub, the most there may be: end some of them"
            raise HubError(ErrorCode.FULL, text, MOST_GENERATING)
        self._credits.open(session.account)
        self._generating[session.key] += not session.train
        self._by_number[session.number] = session
        self._by_seat[session.seat] = session

    def get(self, number: int, key: str) -> Session | None:
        """The session, if it is open and belongs to `key`."""
        session = self._by_number.get(number)
        return session if session is not None and session.key == key else None

    def is_open(self, number: int) -> bool:
        """Whether there is such a session, whoever it belongs to."""
        return number in self._by_number

    def find(self, seat: int) -> Session | None:
        """Who sits there now (for answers, whose addressee was checked when they were asked)."""
        return self._by_seat.get(seat)

    def of_key(self, key: str) -> list[Session]:
        """All open sessions of an edge."""
        return [session for session in self if session.key == key]

    def remove(self, number: int) -> None:
        """Close it."""
        session = self._by_number.pop(number, None)
        if session is None:
            return
        self._credits.close(session.account)
        self._generating[session.key] -= not session.train
        if not self._generating[session.key]:
            del self._generating[session.key]
        if self._by_seat.get(session.seat) is session:
            del self._by_seat[session.seat]

    def pinned(self) -> set[int]:
        """Adapter versions that are in use."""
        return {session.version for session in self if session.version is not None}
