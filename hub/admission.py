"""Whether a request of a session is carried out: new or a repetition, and within the sender's credits."""

from __future__ import annotations

from collections.abc import Callable

import messaging.messages as m
from hub.credits import Credits, Verdict
from hub.guard import too_large
from hub.post import Post, error
from hub.sessions import Session
from messaging.errors import ErrorCode
from messaging.replies import Busy, Gap, New, Replay, Stale
from messaging.transport import Route


class Admission:
    """Answers repetitions from the record; `close` ends a session, with the reason."""

    def __init__(self, post: Post, credits: Credits, close: Callable[[Session, str], None]) -> None:
        self._post = post
        self._credits = credits
        self._close = close

    def admit(self, session: Session, route: Route, packet: m.Packet, size: int) -> bool:
        """Whether a request of `size` bytes is to be carried out. HubError if no credits will ever do for it."""
        request = packet.envelope.request
        if session.replies.is_next(request) and not self._afford(session, route, request, size):
            return False
        match session.replies.admit(request):
            case New():
                session.routes[request] = (route, size)
                return True
            case Replay(frames):
                self._post.replay(route, session.number, request, frames)
            case Busy():
                # The answer goes where the edge can be reached now.
                session.routes[request] = (route, session.routes.get(request, (route, size))[1])
                self._post.tell(session, route, request, error(ErrorCode.BUSY, "in work"))
            case Stale():
                self._post.tell(session, route, request, error(ErrorCode.STALE, "answered long ago"))
            case Gap(expected):
                gap = error(ErrorCode.GAP, "an earlier request is missing", expected)
                self._post.tell(session, route, request, gap)
        return False

    def _afford(self, session: Session, route: Route, request: int, size: int) -> bool:
        """Whether the sender's credits and the hub's memory allow a new request; if not, it is told."""
        match self._credits.take(session.account, size):
            case Verdict.TAKEN:
                return True
            case Verdict.LATER:
                self._post.later(route, session.number, request)
            case Verdict.NEVER:
                raise too_large(self._credits.budget)
            case Verdict.BROKEN:
                self._close(session, "it sent more than its credits allow")
        return False
