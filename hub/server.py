"""The hub's I/O loop: reads what arrives, lets the scheduler decide, sends what it says.

startup, main_loop and shutdown tell the whole story. The loop owns the sockets and the sessions; tensors are
computed by the worker's thread, files are read and hashed by a helper thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import messaging.messages as m
from hub.admission import Admission
from hub.computing import Computing
from hub.desk import Desk
from hub.door import Door
from hub.engine import Engine
from hub.figures import Figures
from hub.filing import Filing
from hub.groups import Group, Groups
from hub.guard import Guard
from hub.jobs import EdgeAdapter
from hub.keeper import Keeper
from hub.ledger import Ledger
from hub.library import Library
from hub.lull import Lull
from hub.monitor import HubSnapshot
from hub.post import Post, error, refusal
from hub.recovery import Recovery, seats_of
from hub.replicas.remote import RemoteEngine
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import State
from hub.seating import Seating
from hub.sessions import Session, Sessions
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState
from hub.watch import Watch
from hub.worker import Report, Worker
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, ForeignSession, HubError, ProtocolError, VersionMismatch
from messaging.framing import decode
from messaging.transport import WATCH_S, Arrival, Channel, HubSide, Route

_TICK_S = 0.5
_PARKED_S = 0.02
_FLUSH_S = 3.0
_SEEN_S = 60.0
#: What goes through all sessions is done more seldom where there are many.
_LOOK_S_PER_SESSION, _LOOK_MOST_S = 0.001, 1.0
_SNAPSHOT_S_PER_SESSION, _SNAPSHOT_MOST_S = 0.003, 3.0


class Server:
    """Everything of a hub but the command line. `run` returns when `stop` was called, or raises."""

    def __init__(
        self,
        transport: HubSide,
        state: HubState,
        library: Library,
        engines: Sequence[Engine | RemoteEngine],
        keeper: Keeper,
        states: Sequence[State],
        desk: Desk,
        journal: Journal,
        grace_s: float,
        checkpoint_s: float,
        deadline_s: float,
        check_gate: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._state = state
        self._desk = desk
        self._journal = journal
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        keeper.report = lambda event: self._from_thread(partial(self._computing.kept, event))
        self._post = Post(transport, desk.epoch, desk.credits, clock)
        self._door = Door(state, self._post, journal, check_gate)
        self._filing = Filing(library, desk, journal, self._from_thread)
        self._sessions = Sessions(desk.epoch, desk.credits)
        self._ledger = Ledger(desk.applied, desk.round_tokens, desk.home)
        self._groups = Groups([], self._decide)
        for number, (engine, at) in enumerate(zip(engines, states, strict=True)):
            worker = Worker(engine, number, keeper, self._reporter(number))
            self._groups.all.append(Group(number, Scheduler(at), worker, clock() + checkpoint_s))
        self._seating = Seating(
            self._sessions, self._groups, state.access, desk, self._door, self._ledger, journal, grace_s, clock
        )
        self._admission = Admission(self._post, desk.credits, self._sessions, self._groups.members, self._seating.close)
        self._deadline_s = deadline_s
        self._stopping = threading.Event()
        self._tick_at = clock()
        self._seen_at = clock() + _SEEN_S
        self._guard = Guard(transport, self._post, state.access, desk, journal)
        self._look_at = self._look_at_sessions = clock()
        self._lull = Lull(clock)
        self._watch = Watch(journal, clock)
        self._figures = Figures(clock, self._watch)
        recovery = Recovery(self._groups, keeper, self._sessions, self._seating, self._ledger, state.adapters, journal)
        self._computing = Computing(
            self._groups, keeper, recovery, self._sessions, self._seating, self._ledger, self._figures, self._filing,
            desk, journal, checkpoint_s, clock,
        )  # fmt: skip
        self._snapshot_at = clock()
        #: the answer to pings by group, as long as one portion of arrivals is taken
        self._pongs: dict[int | None, m.Pong] = {}
        self.snapshot: HubSnapshot = self._figures.snapshot(self)

    # -- life ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`. Raises what the compute thread died of."""
        self._startup()
        try:
            self._main_loop()
        finally:
            self._shutdown()
        if self._computing.failure is not None:
            raise self._computing.failure

    def stop(self) -> None:
        """Ask `run` to end; for any thread and for signal handlers."""
        self._stopping.set()
        self._transport.wake()

    def _startup(self) -> None:
        self._computing.start()

    def _main_loop(self) -> None:
        while not self._stopping.is_set() and self._computing.failure is None:
            next_at = min(self._tick_at, self._look_at, self._groups.next_deadline)
            wait = _PARKED_S if self._post.waiting else max(next_at - self._clock(), 0.0)
            arrivals = self._transport.poll(wait)
            self._pongs.clear()
            for arrival in arrivals:
                self._arrived(arrival)
            while not self._inbox.empty():
                self._lull.disturb()
                self._inbox.get()()
            if self._post.waiting:
                self._post.send_parked()
            elif arrivals:
                self._transport.rest(self._lull.rest_s(len(self._sessions)))
            self._groups.pass_deadlines(self._clock())
            if self._clock() >= self._look_at:
                self._look_at = self._clock() + WATCH_S
                self._guard.look()
            if self._clock() >= self._tick_at:
                self._tick()

    def _shutdown(self) -> None:
        """Finish what is being computed, send what is due, write a checkpoint."""
        self._computing.stop(lambda: self._inbox.get()())
        while not self._inbox.empty():
            self._inbox.get()()
        deadline = self._clock() + _FLUSH_S
        while self._post.waiting and self._clock() < deadline:
            self._post.send_parked()
            time.sleep(_PARKED_S)
        for session in self._sessions:
            for request, (route, _) in session.routes.items():
                self._post.tell(session, route, request, error(ErrorCode.SHUTDOWN, "the hub is stopping"))
        self._filing.close()
        self._computing.finish()

    def _reporter(self, group: int) -> Callable[[Report], None]:
        return lambda event: self._from_thread(partial(self._computing.done, event, group))

    def _from_thread(self, job: Callable[[], None]) -> None:
        """Have the loop run `job`; for other threads."""
        self._inbox.put(job)
        self._transport.wake()

    # -- arrivals ------------------------------------------------------------------------------------

    def _arrived(self, arrival: Arrival) -> None:
        if arrival.route.channel is Channel.ENROL:
            self._door.enrol(arrival)
            return
        name = self._state.access.name_of(arrival.key)
        if name is None:
            self._door.turn_away(arrival)
            return
        try:
            packet = decode(arrival.frames, m.TO_HUB)
        except ProtocolError as fault:
            self._figures.refused += 1
            self._door.violation(arrival, name, fault)
            code = ErrorCode.VERSION if isinstance(fault, VersionMismatch) else ErrorCode.PROTOCOL
            self._post.reply(arrival.route, 0, refusal(fault, code))
            return
        if not isinstance(packet.message, m.Ping):
            self._lull.disturb()
        size = sum(len(frame) for frame in arrival.frames)
        try:
            # What an edge does is booked under the key that it enrolled with, whatever key it has by now.
            self._take(self._state.access.origin_of(arrival.key), name, arrival.route, packet, size)
        except FedseaError as fault:
            if isinstance(fault, ProtocolError | ForeignSession):
                self._door.violation(arrival, name, fault)
            envelope = packet.envelope
            self._post.reply(arrival.route, envelope.request, refusal(fault), envelope.session)

    def _take(self, key: str, name: str, route: Route, packet: m.Packet, size: int) -> None:
        message, envelope = packet.message, packet.envelope
        match message:
            case m.Describe():
                self._door.announce(key, route)
                self._post.reply(route, envelope.request, self._describe(message))
            case m.ReplaceKey():
                self._replace_key(key, route, envelope.request, message)
            case m.Fetch():
                self._fetch(key, route, envelope.request, message)
            case m.Hello():
                self._hello(key, name, route, envelope.request, message)
            case m.Ping() if not envelope.session:
                self._door.announce(key, route)
                self._post.reply(route, envelope.request, self._pong())
            case _:
                self._take_in_session(key, route, packet, size)

    def _take_in_session(self, key: str, route: Route, packet: m.Packet, size: int) -> None:
        envelope = packet.envelope
        session = self._sessions.get(envelope.session, key)
        if session is None and self._sessions.is_open(envelope.session):
            raise ForeignSession()
        if session is None or envelope.epoch != self._desk.epoch:
            raise HubError(ErrorCode.NO_SESSION, "the hub has no such session: it was restarted, or the session ended")
        self._seating.heard(session)
        session.replies.ack(envelope.ack)
        self._desk.credits.record(session.account, session.replies.kept_bytes)
        match packet.message:
            case m.Ping():
                session.ping = packet.message
                self._door.announce(key, route)
                self._post.tell(session, route, envelope.request, self._pong(session.group))
            case m.CloseStream():
                self._decide(ev.StreamClosed(session.seat, packet.message.stream), session.group)
            case _:
                if self._admission.admit(session, route, packet, size):
                    self._begin(session, packet)

    def _begin(self, session: Session, packet: m.Packet) -> None:
        message, request = packet.message, packet.envelope.request
        try:
            event = self._desk.event_of(session, request, message)
        except FedseaError as fault:
            self._post.answer(session, request, refusal(fault))
            return
        match message:
            case m.Upload():
                self._filing.upload(session, message, partial(self._uploaded, session, request, message.round))
            case m.Leave():
                if not message.done:
                    self._seating.leaving(session)
                self._decide(ev.EdgeLeft(session.seat, bool(message.done)), session.group)
                self._post.answer(session, request, m.Bye())
                if not message.done:
                    self._seating.leave(session, message.reason)
            case _ if event is not None:
                self._decide(event, session.group)

    # -- sessions ------------------------------------------------------------------------------------

    def _hello(self, key: str, name: str, route: Route, request: int, hello: m.Hello) -> None:
        self._guard.check(key)
        session, welcome = self._seating.hello(key, name, route, hello)
        self._post.tell(session, route, request, welcome)
        self._filing.run(partial(self._state.access.record_seen, [key]))

    def restore(self, parts: Sequence[Checkpoint]) -> None:
        """Seat those whom the last checkpoint knows; edges of replicas that are no more take seats in other groups."""
        with self._groups.held():
            for number, part in enumerate(parts):
                members, answered, gathered = seats_of(part)
                if number < len(self._groups):
                    self._seating.restore(members, answered, gathered, number)
                    continue
                for note in members:
                    self._seating.take_in(note, answered, self._groups.place(self._sessions, True))
        for group in self._groups:
            # The round may have had all that it needs to close.
            self._decide(ev.OthersChanged(group.state.elsewhere), group.number)

    def _replace_key(self, key: str, route: Route, request: int, message: m.ReplaceKey) -> None:
        self._door.replace_key(key, route, request, message)
        self._seating.key_replaced(key)

    # -- what the scheduler says -----------------------------------------------------------------------

    def _decide(self, event: ev.Event, number: int) -> None:
        """Tell a group's scheduler and carry out what it answers."""
        group = self._groups[number]
        for action in group.scheduler.handle(event):
            match action:
                case act.Note():
                    self._journal.log(action.text)
                case act.Refuse():
                    self._reply(action.session, action.request, error(action.code, action.text, action.detail))
                case act.StartDeadline():
                    group.deadline = (self._clock() + self._deadline_s, action.gathering)
                case act.AnswerForward():
                    self._reply(action.session, action.request, self._desk.hidden(action))
                case act.AnswerBackward():
                    self._answer_backward(action)
                case act.AnswerInfer():
                    self._reply(action.session, action.request, self._desk.infer_hidden(action))
                case act.AnswerRound():
                    self._answer_round(action)
                case _:
                    self._computing.begin(action, group)
        self._groups.settle()

    def _answer_backward(self, action: act.AnswerBackward) -> None:
        session = self._sessions.find(action.session)
        checkpoint = self._ledger.begun(session.key) if session is not None else 0
        self._reply(action.session, action.request, self._desk.grad(action, checkpoint))

    def _answer_round(self, action: act.AnswerRound) -> None:
        published = m.Published(action.version, action.round, int(action.over))
        self._reply(action.session, action.request, published)

    # -- answers ---------------------------------------------------------------------------------------

    def _fetch(self, key: str, route: Route, request: int, message: m.Fetch) -> None:
        """Read a piece of a file for an edge, if there is room for it."""
        credits = self._desk.credits
        if self._post.behind(route) or not credits.hold(key, message.length):
            self._post.later(route, 0, request)
            return

        def done(answer: m.AnyMessage) -> None:
            credits.release(key, message.length)
            self._post.reply(route, request, answer)

        self._filing.fetch(message, done)

    def _describe(self, message: m.Describe) -> m.AnyMessage:
        if not message.min_version <= m.PROTOCOL_VERSION <= message.max_version:
            return self._desk.version_error(message.min_version, message.max_version, message.software)
        state = self._groups.running[0].state
        return self._desk.description(state.version, state.round)

    def _pong(self, group: int | None = None) -> m.Pong:
        """How it stands with the hub; round and version are those of a group: another may be a moment ahead."""
        if group not in self._pongs:
            self._pongs[group] = self._look_around(group)
        return self._pongs[group]

    def _look_around(self, group: int | None) -> m.Pong:
        state = self._groups.running[0].state if group is None else self._groups.state(group)
        return m.Pong(
            sessions=len(self._sessions),
            joined=sum(len(other.state.active) for other in self._groups),
            cohort=state.cohort,
            round=state.round,
            step=sum(other.state.hub_step for other in self._groups),
            adapter_version=state.version,
            queue=len(state.infers),
            stopping=int(self._stopping.is_set()),
            busy_s=int(self._figures.overdue_s),
        )

    def _uploaded(
        self, session: Session, request: int, round_: int, answer: m.AnyMessage, adapter: EdgeAdapter | None
    ) -> None:
        if adapter is not None:
            weighed = replace(adapter, tokens=self._ledger.weight(session.key, adapter.tokens))
            self._decide(ev.AdapterUploaded(session.seat, round_, weighed), session.group)
        self._post.answer(session, request, answer)

    def _reply(self, seat: int, request: int, message: m.AnyMessage) -> None:
        session = self._sessions.find(seat)
        if session is not None:
            self._post.answer(session, request, message)

    # -- time ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._clock()
        self._tick_at = now + _TICK_S
        if now >= self._look_at_sessions:
            self._look_at_sessions = now + min(len(self._sessions) * _LOOK_S_PER_SESSION, _LOOK_MOST_S)
            self._seating.look(now)
            self._watch.look(self._sessions, [group.state for group in self._groups], self._figures.overdue_s)
        self._computing.look(now)
        self._seating.look_at_keys()
        if now >= self._seen_at:
            self._seen_at = now + _SEEN_S
            seen = {session.key for session in self._sessions if now - session.heard_at < _SEEN_S}
            self._filing.run(partial(self._state.access.record_seen, seen))
        self._door.tick()
        if now >= self._snapshot_at:
            self._snapshot_at = now + min(len(self._sessions) * _SNAPSHOT_S_PER_SESSION, _SNAPSHOT_MOST_S)
            self.snapshot = self._figures.snapshot(self)
