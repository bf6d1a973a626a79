"""How the hub's answers get out: encoded, recorded where they may be asked for again, parked where a socket is full."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import messaging.messages as m
from hub.credits import Credits
from hub.sessions import Session
from messaging.errors import ErrorCode, FedseaError, HubError
from messaging.framing import encode
from messaging.transport import Buffer, HubSide, Route, SendResult

#: Answers that wait, in all and for one connection; their bytes are bounded by the credits.
_MOST_PARKED, _MOST_PARKED_ROUTE = 16384, 1024
_MOST_TEXT = 2000
#: What is this small may wait whether or not the budget has room; its number is bounded.
_NOTICE_BYTES = 512
#: Who is behind by more than its credits for so long, and reads more slowly than this, does not read.
_STUCK_S, _SLOWEST_BYTES_PER_S = 10.0, 64 * 1024


@dataclass
class _Queue:
    """The answers that one connection cannot take yet, since `since`, when `unread` bytes were on their way to it."""

    since: float
    unread: int
    frames: deque[Sequence[Buffer]] = field(default_factory=deque)
    size: int = 0
    #: bytes sent from here since then
    sent: int = 0


@dataclass(frozen=True)
class Stuck:
    """A connection that was cut because nobody reads it: its key if known, and bytes on their way or waiting here."""

    key: str | None
    unread: int


class Post:
    """Sends for the loop's thread. `epoch` and the session's credits go into every envelope.

    What a connection has not read yet may be as much as a session's credits, or one answer. What is beyond
    waits here, as far as the budget has room. In place of the rest a short notice waits: ask again.
    """

    def __init__(
        self, transport: HubSide, epoch: int, credits: Credits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._transport = transport
        self._epoch = epoch
        self._credits = credits
        self._clock = clock
        self._parked: dict[Route, _Queue] = {}
        self._count = 0

    @property
    def waiting(self) -> bool:
        """Whether answers wait for a socket to take them."""
        return bool(self._parked)

    def behind(self, route: Route) -> bool:
        """Whether answers wait for this connection: what is large should not be begun for it now."""
        return route in self._parked

    def answer(self, session: Session, request: int, message: m.AnyMessage) -> None:
        """The final answer to an admitted request: recorded, so that a repetition gets the same."""
        route, size = session.routes.pop(request, (None, 0))
        self._credits.give_back(session.account, size)
        frames = encode(self._packet(session, request, message))
        session.replies.record(request, frames)
        self._credits.record(session.account, session.replies.kept_bytes)
        if route is not None:
            self.replay(route, session.number, request, frames)

    def tell(self, session: Session, route: Route, request: int, message: m.AnyMessage) -> None:
        """An answer that is not recorded: Pong, WELCOME, BUSY and the like."""
        self.replay(route, session.number, request, encode(self._packet(session, request, message)))

    def reply(self, route: Route, request: int, message: m.AnyMessage, session: int = 0) -> None:
        """An answer outside of a session, or to a session that there is not."""
        frames = encode(m.Packet(message, m.Envelope(session, self._epoch, request)))
        self.replay(route, session, request, frames)

    def later(self, route: Route, session: int, request: int) -> None:
        """There is no room for this request, or for its answer: the edge sends it again in a while."""
        self.reply(route, request, error(ErrorCode.LATER, "the hub has no room just now"), session)

    def replay(self, route: Route, session: int, request: int, frames: Sequence[Buffer]) -> None:
        """Send an answer's frames as they are; a peer that is gone asks again when it is back."""
        if route not in self._parked and self._send(route, frames) is not SendResult.FULL:
            return
        if not self._park(route, frames) and _size(frames) > _NOTICE_BYTES:
            self.later(route, session, request)

    def send_parked(self) -> None:
        """Try again what did not fit."""
        for route, queue in list(self._parked.items()):
            while queue.frames:
                result = self._send(route, queue.frames[0])
                if result is SendResult.FULL:
                    break
                queue.sent += self._unpark(route, queue)
                if result is SendResult.GONE:
                    self._forget(route)
                    break
            if not queue.frames:
                self._parked.pop(route, None)

    def cut_stuck(self) -> list[Stuck]:
        """Cut the connections that do not read; what they miss they may ask for again."""
        now, found = self._clock(), []
        for route, queue in list(self._parked.items()):
            behind = now - queue.since
            if behind < _STUCK_S:
                continue
            unread = self._transport.unread(route, 0)
            if queue.unread + queue.sent - unread < _SLOWEST_BYTES_PER_S * behind:
                unread += queue.size
                self._forget(route)
                found.append(Stuck(self._transport.cut(route), unread))
            else:
                queue.since, queue.unread, queue.sent = now, unread, 0
        return found

    def _send(self, route: Route, frames: Sequence[Buffer]) -> SendResult:
        size, most = _size(frames), self._credits.share
        unread = self._transport.unread(route, max(most - size, 0))
        # As for the edge: one may be on its way even if it is larger than the credits.
        if unread and unread + size > most:
            return SendResult.FULL
        return self._transport.send(route, frames)

    def _park(self, route: Route, frames: Sequence[Buffer]) -> bool:
        size, queue = _size(frames), self._parked.get(route)
        if self._count >= _MOST_PARKED or (queue is not None and len(queue.frames) >= _MOST_PARKED_ROUTE):
            return False
        if size > _NOTICE_BYTES and not self._credits.hold(route, size):
            return False
        if queue is None:
            queue = self._parked[route] = _Queue(self._clock(), self._transport.unread(route, 0))
        queue.frames.append(frames)
        queue.size += size
        self._count += 1
        return True

    def _unpark(self, route: Route, queue: _Queue) -> int:
        size = _size(queue.frames.popleft())
        queue.size -= size
        self._count -= 1
        if size > _NOTICE_BYTES:
            self._credits.release(route, size)
        return size

    def _forget(self, route: Route) -> None:
        queue = self._parked.pop(route)
        while queue.frames:
            self._unpark(route, queue)

    def _packet(self, session: Session, request: int, message: m.AnyMessage) -> m.Packet:
        ack, credits = session.replies.next - 1, self._credits.tell(session.account)
        return m.Packet(message, m.Envelope(session.number, self._epoch, request, ack, credits))


def _size(frames: Sequence[Buffer]) -> int:
    return sum(len(frame) for frame in frames)


def refusal(error: object, otherwise: ErrorCode = ErrorCode.PROTOCOL) -> m.Error:
    """An exception as an Error message; `otherwise` is the code of those that have none."""
    text = str(error)[:_MOST_TEXT]
    if isinstance(error, HubError):
        return m.Error(error.code, error.detail, text)
    finite = not (isinstance(error, FedseaError) and error.exit_code == 5)
    return m.Error(otherwise if finite else ErrorCode.NOT_FINITE, 0, text)


def error(code: ErrorCode, text: str, detail: int = 0) -> m.Error:
    """An Error message."""
    return m.Error(code, detail, text[:_MOST_TEXT])
