"""At the hub's door: enrolment, who is turned away and told why, keys that change, and what the audit log hears of it.

For the loop's thread alone, but `refused`, which the gatekeeper's thread calls.
"""

from __future__ import annotations

from collections.abc import Callable

import messaging.messages as m
from hub.post import Post, error
from hub.sessions import Session
from hub.store.state import HubState
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, Refused, VersionMismatch
from messaging.framing import decode
from messaging.transport import Arrival, Route


class Door:
    """`check_gate` is asked at each tick what there is to tell of the gatekeeper."""

    def __init__(self, state: HubState, post: Post, journal: Journal, check_gate: Callable[[], str | None]) -> None:
        self._access = state.access
        self._audit = state.audit
        self._audit.tell = journal.log
        self._state = state
        self._post = post
        self._journal = journal
        self._check_gate = check_gate
        self._next_key = state.next_key()
        #: edges that were told of it -> whether the list notes that they were here since
        self._told: dict[str, bool] = {}

    def tick(self) -> None:
        """Twice a second: see to the gatekeeper, the log, and whether the hub is to have another key."""
        news = self._check_gate()
        if news is not None:
            self._journal.log(news)
            self._audit.write("gatekeeper", reason=news)
        self._audit.flush()
        announced = self._state.next_key()
        if announced != self._next_key:
            self._next_key = announced
            self._journal.log("the hub gets another key at its next start; edges that are here learn it now")
        if told := [origin for origin, noted in self._told.items() if not noted]:
            # So that `hub rotate-key` can say for whom to wait.
            self._access.record_seen(told)
            self._told.update(dict.fromkeys(told, True))

    # -- coming in -----------------------------------------------------------------------------------

    def enrol(self, arrival: Arrival) -> None:
        """Answer a message on the socket that is open to every key."""
        route = arrival.route
        try:
            packet = decode(arrival.frames, m.ENROL_TO_HUB)
        except FedseaError as fault:
            self._audit.write_often(
                "protocol violation", key=arrival.key, address=route.address, reason=f"enrolling: {fault}"
            )
            if isinstance(fault, VersionMismatch):
                self._post.reply(route, m.UNORDERED_BASE, error(ErrorCode.VERSION, str(fault)))
            return
        message = packet.message
        assert isinstance(message, m.Enrol)
        answer: m.AnyMessage
        try:
            answer = m.Enrolled(self._access.enrol(message.token, arrival.key, message.name, route.address))
            self._journal.log(f"{answer.name} enrolled")
        except Refused as fault:
            answer = error(ErrorCode.TOKEN, str(fault))
            self._journal.log(f"enrolment of {message.name[:48]!r} refused: {fault}")
        self._post.reply(route, packet.envelope.request, answer)

    def turn_away(self, arrival: Arrival) -> None:
        """Refuse what came from a key that is not on the list, whose connection is still up."""
        why, text = self._access.standing(arrival.key), self._access.why_not(arrival.key)
        self._audit.write_often(
            "message refused", group=arrival.key, key=arrival.key, address=arrival.route.address, reason=f"{why} key"
        )
        self._post.reply(arrival.route, 0, error(ErrorCode.NOT_ENROLLED, text))

    def violation(self, arrival: Arrival, name: str, fault: object) -> None:
        """An enrolled edge sent what breaks the protocol, or what belongs to another."""
        self._audit.write_often(
            "protocol violation",
            group=arrival.key,
            name=name,
            key=arrival.key,
            address=arrival.route.address,
            reason=str(fault),
        )

    # -- keys ----------------------------------------------------------------------------------------

    def announce(self, origin: str, route: Route) -> None:
        """Tell an edge which key the hub has from its next start on, if it is to be another."""
        if self._next_key is not None:
            self._post.reply(route, 0, m.NextHubKey(self._next_key))
            self._told.setdefault(origin, False)

    def replace_key(self, origin: str, route: Route, request: int, message: m.ReplaceKey) -> None:
        """Put an edge's new key in the place of its present one. Refused says why not."""
        name = self._access.replace(origin, message.key, route.address)
        self._journal.log(f"{name} has a new key; the old one is good no more")
        self._post.reply(route, request, m.KeyReplaced(name))

    # -- sessions ------------------------------------------------------------------------------------

    def opened(self, session: Session, route: Route) -> None:
        """A session was opened or taken over by a new process."""
        what = "to train" if session.train else "to generate"
        self._audit.write_often(
            "session opened",
            group=session.key,
            name=session.name,
            key=self._access.present_key(session.key),
            address=route.address,
            reason=f"{what}, number {session.number}",
        )

    def closed(self, session: Session, why: str) -> None:
        """A session has ended."""
        key = self._access.present_key(session.key)
        reason = f"{why}, number {session.number}"
        self._audit.write_often("session closed", group=session.key, name=session.name, key=key, reason=reason)

    def cut_off(self, session: Session, why: str) -> None:
        """A session ends from this side; whoever waits for answers is told to open another."""
        self.closed(session, why)
        for request, (route, _) in session.routes.items():
            self._post.tell(session, route, request, error(ErrorCode.NO_SESSION, f"{why}: open another session"))

    def shut_out(self, session: Session) -> None:
        """Tell an edge that waits for answers that its key is revoked."""
        text = self._access.why_not(session.key)
        for request, (route, _) in session.routes.items():
            self._post.tell(session, route, request, error(ErrorCode.NOT_ENROLLED, text))
