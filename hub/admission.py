"""Whether a request of a session is carried out: new or a repetition, and within the sender's credits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import messaging.messages as m
from hub.credits import Credits, Verdict
from hub.guard import cohort_too_large, too_large
from hub.post import Post, error
from hub.scheduler.state import Member
from hub.sessions import Session, Sessions
from messaging.errors import ErrorCode
from messaging.replies import Busy, Gap, New, Replay, Stale
from messaging.transport import Route


class Admission:
    """Answers repetitions from the record; `close` ends a session, with the reason."""

    def __init__(
        self,
        post: Post,
        credits: Credits,
        sessions: Sessions,
        members: Callable[[], Iterable[Member]],
        close: Callable[[Session, str], None],
    ) -> None:
        self._post = post
        self._credits = credits
        self._sessions = sessions
        self._members = members
        self._close = close

    def admit(self, session: Session, route: Route, packet: m.Packet, size: int) -> bool:
        """Whether a request of `size` bytes is to be carried out. HubError if no credits will ever do for it."""
        request = packet.envelope.request
        if session.replies.is_next(request) and not self._afford(session, route, packet, size):
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

    def _afford(self, session: Session, route: Route, packet: m.Packet, size: int) -> bool:
        """Whether the sender's credits and the hub's memory allow a new request; if not, it is told."""
        match self._credits.take(session.account, size):
            case Verdict.TAKEN:
                return True
            case Verdict.LATER:
                if isinstance(packet.message, m.StepForward) and self._waiting_bytes() + size > self._credits.budget:
                    raise cohort_too_large(self._credits.budget)
                self._post.later(route, session.number, packet.envelope.request)
            case Verdict.NEVER:
                raise too_large(self._credits.budget)
            case Verdict.BROKEN:
                self._close(session, "it sent more than its credits allow")
        return False

    def _waiting_bytes(self) -> int:
        """Bytes of the steps that wait for the rest of their cohort, and give no room before it is here."""
        waiting = {member.session for member in self._members() if member.smashed}
        return sum(session.account.outstanding for session in self._sessions if session.seat in waiting)
