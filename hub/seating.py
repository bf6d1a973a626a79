"""Who has a session at the hub, and which seat of the cohort: opening, coming back, falling silent, going.

For the loop's thread alone. A seat outlives the process of an edge that sits there, and the hub's own process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import messaging.messages as m
from hub.desk import Desk
from hub.door import Door
from hub.groups import Groups
from hub.ledger import Ledger
from hub.membership import Answered, MemberNote
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase
from hub.sessions import Session, Sessions
from hub.store.access import AccessList
from hub.store.files import StoreError
from messaging.console import Journal
from messaging.transport import Route

#: Silent sessions are forgotten after this; edges that train may come back all the same.
_TRAIN_SILENCE_S, _INFER_SILENCE_S = 600.0, 120.0
#: Generations that a restart broke off come back within this time for the adapter version that they began with.
_RETURN_S = 60.0


class Seating:
    """`groups`: where there is a place for an edge, and whom to tell."""

    def __init__(
        self,
        sessions: Sessions,
        groups: Groups,
        access: AccessList,
        desk: Desk,
        door: Door,
        ledger: Ledger,
        journal: Journal,
        grace_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._sessions = sessions
        self._groups = groups
        self._access = access
        self._desk = desk
        self._door = door
        self._ledger = ledger
        self._journal = journal
        self._grace_s = grace_s
        self._clock = clock
        self._returning_until = clock() + _RETURN_S

    # -- opening -------------------------------------------------------------------------------------

    def hello(self, key: str, name: str, route: Route, hello: m.Hello) -> tuple[Session, m.Welcome]:
        """The session that a HELLO resumes or opens. Raises HubError with the reason and what to do."""
        session = self._sessions.get(hello.resume, key) if hello.resume else None
        if session is None:
            session = self._open(key, name, hello)
            self._door.opened(session, route)
        else:
            self.heard(session)
        state = self._groups.state(session.group)
        return session, self._desk.welcome(session, state.version, state.round, self._ledger.durable(key))

    def _open(self, key: str, name: str, hello: m.Hello) -> Session:
        """A session for a process of an edge; one that trains takes the seat of the process before it."""
        self._desk.check_hello(hello)
        before = self._before(key, hello) if hello.train else None
        group = self._group_for(key, bool(hello.train)) if before is None else before.group
        version = None if hello.train else self._version(hello, group)
        session = self._session(key, name, (hello.p, hello.q), before, version, group)
        if before is None:
            if session.train:
                self._access.note_back(key)
            self._sessions.add(session)
            if session.train:
                self._ledger.move(key, group)
            self._decide(ev.EdgeJoined(session.seat, name, session.train, session.applied), group)
        else:
            session.forwarded, session.silent = before.forwarded, before.silent
            self._sessions.remove(before.number)
            self._sessions.add(session)
            self._journal.log(f"{name} is here again at step {session.applied}")
            self._decide(ev.EdgeRestarted(session.seat), group)
            self.heard(session)
        return session

    def _decide(self, event: ev.Event, group: int) -> None:
        self._groups.decide(event, group)

    def _group_for(self, key: str, train: bool) -> int:
        """Where an edge has trained in the open round, or is inside a step, it goes on; else where least is to do."""
        home = self._ledger.home(key)
        trains = self._ledger.round_tokens(key) or self._ledger.inside(key)
        if train and trains and not self._groups[home].gone:
            return home
        return self._groups.place(self._sessions, train)

    def _session(
        self, key: str, name: str, partition: tuple[int, int], before: Session | None, version: int | None, group: int
    ) -> Session:
        number = self._sessions.number()
        return Session(
            number=number,
            seat=number if before is None else before.seat,
            key=key,
            name=name,
            train=version is None,
            partition=partition,
            place=self._desk.place(*partition),
            version=version,
            replies=self._desk.new_replies(),
            heard_at=self._clock(),
            applied=self._ledger.applied(key),
            group=group,
        )

    def _version(self, hello: m.Hello, group: int) -> int:
        """The adapter that a generation uses: the one that it began with, if it is served, or the newest."""
        return hello.version if hello.version in self._groups.served(group) else self._groups.state(group).version

    def _before(self, key: str, hello: m.Hello) -> Session | None:
        """The training session of an earlier process of this edge, whose seat this one can take."""
        seated = None
        for old in self._sessions.of_key(key):
            if not old.train:
                continue
            if old.partition == (hello.p, hello.q) and old.seat in self._groups.state(old.group).members:
                seated = old
            else:
                self.close(old, "it joined again")
        return seated

    def restore(
        self, members: Sequence[MemberNote], answered: Sequence[Answered], gathered: bool, group: int = 0
    ) -> None:
        """Keep the seats of those who trained when the checkpoint was written, until their grace is over."""
        state, answers = self._groups.state(group), {item.key: item for item in answered}
        for note in self.waited_for(members):
            name = self._access.name_by_origin(note.key)
            if name is None:  # revoked at this very moment
                continue
            session = self._session(note.key, name, note.partition, None, None, group)
            self._ledger.move(note.key, group)
            session.forwarded = (session.applied, 0)
            self._sessions.add(session)
            member = Member(session.seat, name, session.applied, contributes=note.contributes)
            state.members[session.seat] = member
            known = answers.get(note.key)
            if known is not None and known.taken.step == session.applied - 1:
                member.hiddens, member.taken = {known.taken.step: dict(known.hiddens)}, known.taken
        if state.members and gathered and state.phase is Phase.GATHERING:
            state.phase = Phase.CLOSING if state.round_step >= state.round_steps else Phase.FORWARD
            names = ", ".join(member.name for member in state.members.values())
            self._journal.log(f"waiting for {names} to come back")
        self._groups.settle()

    def waited_for(self, notes: Iterable[MemberNote]) -> list[MemberNote]:
        """Those of a checkpoint's members whose seats are kept for them.

        Not who has left since: it may never come back, and the others would wait for it.
        """
        gone = self._access.left()
        return [
            note
            for note in notes
            if note.key not in gone and (note.contributes or not note.left) and self._access.name_by_origin(note.key)
        ]

    def take_in(self, note: MemberNote, answered: Sequence[Answered], group: int) -> None:
        """Seat an edge whose replica is no more in another group, which takes steps again if it is closing a round.

        `answered`: what edges of that replica may not have heard. Nothing happens for one that is not waited for.
        """
        if not self.waited_for([note]):
            return
        self._groups.decide(ev.RoundReopened(steps=True), group)
        self.restore([note], answered, True, group)

    def pinned(self) -> set[int]:
        """Adapter versions that generations use, or may come back for after a restart of this hub."""
        returning = self._groups.served() if self._clock() < self._returning_until else set()
        return self._sessions.pinned() | returning

    def catch_up(self) -> None:
        """After a step: an edge that gave up its seat while it was computed, and took another, has that step too."""
        for session in self._sessions:
            if session.train:
                session.applied = self._ledger.applied(session.key)
                member = self._groups.state(session.group).members.get(session.seat)
                if member is not None:
                    member.applied = max(member.applied, session.applied)

    # -- coming and going ----------------------------------------------------------------------------

    def heard(self, session: Session) -> None:
        """Something came from it."""
        session.heard_at = self._clock()
        if session.silent:
            session.silent = False
            self._decide(ev.EdgeCameBack(session.seat), session.group)

    def leaving(self, session: Session) -> None:
        """It is about to hear that the hub knows of its good-bye: from there on no restart of the hub waits for it."""
        if not session.train:
            return
        try:
            self._access.note_left(session.key)
        except StoreError as error:
            self._journal.log(f"{session.name} leaves, which a hub that is started again may not know: {error}")

    def leave(self, session: Session, reason: str) -> None:
        """It says good-bye."""
        self._door.closed(session, f"it left: {reason}")
        self._decide(ev.EdgeGone(session.seat), session.group)
        self._sessions.remove(session.number)

    def close(self, session: Session, why: str) -> None:
        """End a session that did not say good-bye."""
        self._journal.log(f"{session.name}: session closed: {why}")
        self._door.closed(session, why)
        self._sessions.remove(session.number)
        self._decide(ev.EdgeGone(session.seat), session.group)

    def drop(self, session: Session, why: str) -> None:
        """End a session whose replica died; its edge opens another one at once, and no scheduler knows this one."""
        self._door.cut_off(session, why)
        self._sessions.remove(session.number)

    def key_replaced(self, key: str) -> None:
        """The edge has another key now; whatever used the old one hears no more."""
        for session in self._sessions.of_key(key):
            if session.train:
                # Its seat and its record are for the next process, with the new key.
                session.routes.clear()
                self._desk.credits.give_back(session.account, session.account.outstanding)
            else:
                self.close(session, "its key was replaced")

    def look(self, now: float) -> None:
        """Note who has fallen silent, and who is silent for so long that it is forgotten."""
        for session in self._sessions:
            quiet = now - session.heard_at
            if session.routes:
                session.owed_at = now
            elif session.train and min(quiet, now - session.owed_at) > self._grace_s and not session.silent:
                session.silent = True
                self._decide(ev.EdgeFellSilent(session.seat), session.group)
            most = max(_TRAIN_SILENCE_S, self._grace_s) if session.train else _INFER_SILENCE_S
            if quiet > most and math.isfinite(most):
                self.close(session, f"nothing heard for {quiet:.0f} s")

    def look_at_keys(self) -> None:
        """End the sessions of those whose key was revoked."""
        if self._access.refresh():
            for session in self._sessions:
                if self._access.name_by_origin(session.key) is None:
                    self._door.shut_out(session)
                    self.close(session, "its key is revoked")
