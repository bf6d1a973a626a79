"""How the hub's answers get out: encoded, recorded where they may be asked for again, parked where a socket is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import messaging.messages as m
from hub.sessions import Session
from messaging.errors import ErrorCode, FedseaError, HubError
from messaging.framing import encode
from messaging.transport import Buffer, HubSide, Route, SendResult

_MOST_PARKED = 4096
_MOST_TEXT = 2000


@dataclass(frozen=True)
class _Parked:
    """An answer that the socket would not take yet."""

    route: Route
    frames: Sequence[Buffer]


class Post:
    """Sends for the loop's thread. `epoch` and `credit_bytes` go into every envelope."""

    def __init__(self, transport: HubSide, epoch: int, credit_bytes: int) -> None:
        self._transport = transport
        self._epoch = epoch
        self._credit_bytes = credit_bytes
        self._parked: list[_Parked] = []

    @property
    def waiting(self) -> bool:
        """Whether answers wait for a socket to take them."""
        return bool(self._parked)

    def answer(self, session: Session, request: int, message: m.AnyMessage) -> None:
        """The final answer to an admitted request: recorded, so that a repetition gets the same."""
        route, size = session.routes.pop(request, (None, 0))
        session.outstanding -= size
        frames = encode(self._packet(session, request, message))
        session.replies.record(request, frames)
        if route is not None:
            self.replay(route, frames)

    def tell(self, session: Session, route: Route, request: int, message: m.AnyMessage) -> None:
        """An answer that is not recorded: Pong, WELCOME, BUSY and the like."""
        self.replay(route, encode(self._packet(session, request, message)))

    def reply(self, route: Route, request: int, message: m.AnyMessage, session: int = 0) -> None:
        """An answer outside of a session, or to a session that there is not."""
        self.replay(route, encode(m.Packet(message, m.Envelope(session, self._epoch, request))))

    def replay(self, route: Route, frames: Sequence[Buffer]) -> None:
        """Send frames as they are; a peer that is gone asks again when it is back."""
        if self._transport.send(route, frames) is SendResult.FULL and len(self._parked) < _MOST_PARKED:
            self._parked.append(_Parked(route, frames))

    def send_parked(self) -> None:
        """Try again what did not fit."""
        waiting, self._parked = self._parked, []
        for item in waiting:
            if self._transport.send(item.route, item.frames) is SendResult.FULL:
                self._parked.append(item)

    def _packet(self, session: Session, request: int, message: m.AnyMessage) -> m.Packet:
        ack = session.replies.next - 1
        return m.Packet(message, m.Envelope(session.number, self._epoch, request, ack, self._credit_bytes))


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
