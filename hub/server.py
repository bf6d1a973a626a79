"""The hub's I/O loop: reads what arrives, lets the scheduler decide, sends what it says.

startup, main_loop and shutdown tell the whole story. The loop owns the sockets and the sessions; tensors are
computed by the worker's thread, files are read and hashed by a helper thread.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import messaging.messages as m
from hub.credits import Verdict
from hub.desk import Desk
from hub.door import Door
from hub.figures import Figures
from hub.filing import Filing
from hub.guard import Guard, too_large
from hub.jobs import EdgeAdapter
from hub.ledger import Ledger
from hub.library import Library
from hub.membership import Answered, MemberNote
from hub.monitor import HubSnapshot
from hub.post import Post, error, refusal
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase, State
from hub.sessions import Session, Sessions
from hub.store.state import HubState
from hub.watch import Watch
from hub.worker import CheckpointWritten, Failure, Report, Worker
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, ForeignSession, HubError, ProtocolError, VersionMismatch
from messaging.framing import decode
from messaging.replies import Busy, Gap, New, Replay, Stale
from messaging.transport import WATCH_S, Arrival, Channel, HubSide, Route

_TICK_S = 0.5
_PARKED_S = 0.02
_INFER_SILENCE_S = 120.0
_FLUSH_S = 3.0
#: Silent training sessions are forgotten after this; their edges may come back all the same.
_TRAIN_SILENCE_S = 600.0
_SEEN_S = 60.0
#: Generations that a restart broke off come back within this time for the adapter version that they began with.
_RETURN_S = 60.0
_SNAPSHOT_S_PER_SESSION, _SNAPSHOT_MOST_S = 0.002, 3.0


class Server:
    """Everything of a hub but the command line. `run` returns when `stop` was called, or raises."""

    def __init__(
        self,
        transport: HubSide,
        state: HubState,
        library: Library,
        worker_of: Callable[[Callable[[Report], None]], Worker],
        scheduler_state: State,
        desk: Desk,
        journal: Journal,
        grace_s: float,
        checkpoint_s: float,
        check_gate: Callable[[], str | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._state = state
        self._scheduler = Scheduler(scheduler_state)
        self._desk = desk
        self._journal = journal
        self._grace_s = grace_s
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._worker = worker_of(lambda event: self._from_thread(partial(self._on_compute, event)))
        self._post = Post(transport, desk.epoch, desk.credits, clock)
        self._door = Door(state, self._post, journal, check_gate)
        self._filing = Filing(library, desk, journal, self._from_thread)
        self._sessions = Sessions(desk.epoch, desk.credits)
        self._ledger = Ledger(desk.applied, desk.round_tokens)
        self._checkpoint_s = checkpoint_s
        #: when the next checkpoint is due; inf while one is due or being written
        self._checkpoint_at = clock() + checkpoint_s
        self._stopping = threading.Event()
        self._tick_at = clock()
        self._returning_until = clock() + _RETURN_S
        self._seen_at = clock() + _SEEN_S
        self._failure: BaseException | None = None
        self._guard = Guard(transport, self._post, state.access, desk, journal)
        self._look_at = clock()
        self._watch = Watch(journal, clock)
        self._figures = Figures(clock, self._watch)
        self._snapshot_at = clock()
        self.snapshot: HubSnapshot = self._figures.snapshot(self)

    # -- life ----------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop`. Raises what the compute thread died of."""
        self._startup()
        try:
            self._main_loop()
        finally:
            self._shutdown()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Ask `run` to end; for any thread and for signal handlers."""
        self._stopping.set()
        self._transport.wake()

    def _startup(self) -> None:
        self._worker.start()

    def _main_loop(self) -> None:
        while not self._stopping.is_set() and self._failure is None:
            wait = _PARKED_S if self._post.waiting else max(min(self._tick_at, self._look_at) - self._clock(), 0.0)
            for arrival in self._transport.poll(wait):
                self._arrived(arrival)
            while not self._inbox.empty():
                self._inbox.get()()
            if self._post.waiting:
                self._post.send_parked()
            if self._clock() >= self._look_at:
                self._look_at = self._clock() + WATCH_S
                self._guard.look()
            if self._clock() >= self._tick_at:
                self._tick()

    def _shutdown(self) -> None:
        """Finish what is being computed, send what is due, write a checkpoint."""
        self._scheduler.state.stopping = True
        self._worker.stop()
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
        if self._failure is None:
            self._worker.finish(self._ledger.progress(self._scheduler.state, self._sessions, stopping=True))
            step = self._scheduler.state.hub_step
            self._journal.log(f"checkpoint written at step {step}; start `hub serve` with the same --state to go on")

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
        self._heard(session)
        session.replies.ack(envelope.ack)
        self._desk.credits.record(session.account, session.replies.kept_bytes)
        match packet.message:
            case m.Ping():
                session.ping = packet.message
                self._door.announce(key, route)
                self._post.tell(session, route, envelope.request, self._pong())
            case m.CloseStream():
                self._decide(ev.StreamClosed(session.seat, packet.message.stream))
            case _:
                if self._admit(session, route, packet, size):
                    self._begin(session, packet)

    def _admit(self, session: Session, route: Route, packet: m.Packet, size: int) -> bool:
        """Whether a request is to be carried out; duplicates are answered from the record."""
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
        credits = self._desk.credits
        match credits.take(session.account, size):
            case Verdict.TAKEN:
                return True
            case Verdict.LATER:
                self._post.later(route, session.number, request)
            case Verdict.NEVER:
                raise too_large(credits.budget)
            case Verdict.BROKEN:
                self._close(session, "it sent more than its credits allow")
        return False

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
                self._decide(ev.EdgeLeft(session.seat, bool(message.done)))
                self._post.answer(session, request, m.Bye())
                if not message.done:
                    self._door.closed(session, f"it left: {message.reason}")
                    self._decide(ev.EdgeGone(session.seat))
                    self._sessions.remove(session.number)
            case _ if event is not None:
                self._decide(event)

    # -- sessions ------------------------------------------------------------------------------------

    def _hello(self, key: str, name: str, route: Route, request: int, hello: m.Hello) -> None:
        self._guard.check(key)
        scheduler = self._scheduler.state
        resumed = self._sessions.get(hello.resume, key) if hello.resume else None
        if resumed is None:
            session = self._open(key, name, hello)
        else:
            session = resumed
            self._heard(session)
        durable = self._ledger.durable(key)
        if resumed is None:
            self._door.opened(session, route)
        welcome = self._desk.welcome(session, scheduler.version, scheduler.round, durable)
        self._post.tell(session, route, request, welcome)
        self._filing.run(partial(self._state.access.record_seen, [key]))

    def _open(self, key: str, name: str, hello: m.Hello) -> Session:
        """A session for a process of an edge; one that trains takes the seat of the process before it."""
        place = self._desk.check_hello(hello)
        before = self._before(key, hello) if hello.train else None
        number = self._sessions.number()
        session = Session(
            number=number,
            seat=number if before is None else before.seat,
            key=key,
            name=name,
            train=bool(hello.train),
            partition=(hello.p, hello.q),
            place=place,
            version=None if hello.train else self._version(hello),
            replies=self._desk.new_replies(),
            heard_at=self._clock(),
            applied=self._ledger.applied(key),
        )
        if before is None:
            self._sessions.add(session)
            self._decide(ev.EdgeJoined(session.seat, name, session.train, session.applied))
        else:
            session.forwarded, session.silent = before.forwarded, before.silent
            self._sessions.remove(before.number)
            self._sessions.add(session)
            self._journal.log(f"{name} is here again at step {session.applied}")
            self._decide(ev.EdgeRestarted(session.seat))
            self._heard(session)
        return session

    def _version(self, hello: m.Hello) -> int:
        """The adapter that a generation uses: the one that it began with, if it is served, or the newest."""
        return hello.version if hello.version in self._worker.engine.versions else self._scheduler.state.version

    def _before(self, key: str, hello: m.Hello) -> Session | None:
        """The training session of an earlier process of this edge, whose seat this one can take."""
        seated = None
        for old in self._sessions.of_key(key):
            if not old.train:
                continue
            if old.partition == (hello.p, hello.q) and old.seat in self._scheduler.state.members:
                seated = old
            else:
                self._close(old, "it joined again")
        return seated

    def restore(self, members: Sequence[MemberNote], answered: Sequence[Answered], gathered: bool) -> None:
        """Keep the seats of those who trained when the checkpoint was written, until their grace is over."""
        state, answers = self._scheduler.state, {item.key: item for item in answered}
        for note in members:
            name = self._state.access.name_by_origin(note.key)
            if name is None or (note.left and not note.contributes):
                continue
            number, applied = self._sessions.number(), self._ledger.applied(note.key)
            place = self._desk.place(*note.partition)
            replies, now = self._desk.new_replies(), self._clock()
            self._sessions.add(
                Session(
                    number,
                    number,
                    note.key,
                    name,
                    True,
                    note.partition,
                    place,
                    None,
                    replies,
                    now,
                    applied=applied,
                    forwarded=applied,
                )
            )
            member = state.members[number] = Member(number, name, applied, contributes=note.contributes)
            known = answers.get(note.key)
            if known is not None and known.grad.step == applied - 1:
                member.hiddens, member.grad = {known.grad.step: known.hidden}, known.grad
        if state.members and gathered and state.phase is Phase.GATHERING:
            state.phase = Phase.CLOSING if state.round_step >= state.round_steps else Phase.FORWARD
            names = ", ".join(member.name for member in state.members.values())
            self._journal.log(f"waiting for {names} to come back")

    def _heard(self, session: Session) -> None:
        session.heard_at = self._clock()
        if session.silent:
            session.silent = False
            self._decide(ev.EdgeCameBack(session.seat))

    def _close(self, session: Session, why: str) -> None:
        self._journal.log(f"{session.name}: session closed: {why}")
        self._door.closed(session, why)
        self._sessions.remove(session.number)
        self._decide(ev.EdgeGone(session.seat))

    def _replace_key(self, key: str, route: Route, request: int, message: m.ReplaceKey) -> None:
        self._door.replace_key(key, route, request, message)
        for session in self._sessions.of_key(key):
            if session.train:
                # Its seat and its record are for the next process, with the new key; the old one hears no more.
                session.routes.clear()
                self._desk.credits.give_back(session.account, session.account.outstanding)
            else:
                self._close(session, "its key was replaced")

    # -- what the scheduler says -----------------------------------------------------------------------

    def _decide(self, event: ev.Event) -> None:
        """Tell the scheduler and carry out what it answers."""
        for action in self._scheduler.handle(event):
            match action:
                case act.Note():
                    self._journal.log(action.text)
                case act.Refuse():
                    self._reply(action.session, action.request, error(action.code, action.text))
                case act.AnswerForward():
                    self._reply(action.session, action.request, self._desk.hidden(action))
                case act.AnswerBackward():
                    self._answer_backward(action)
                case act.AnswerInfer():
                    self._reply(action.session, action.request, self._desk.infer_hidden(action))
                case act.AnswerRound():
                    self._answer_round(action)
                case _:
                    if isinstance(action, act.RunForward):
                        self._ledger.begins(action, self._sessions)
                    self._figures.began(action)
                    progress = self._ledger.progress(self._scheduler.state, self._sessions)
                    self._worker.put(action, progress, self._pinned())

    def _pinned(self) -> set[int]:
        """Adapter versions that generations use, or may come back for after a restart of this hub."""
        returning = self._worker.engine.versions if self._clock() < self._returning_until else set()
        return self._sessions.pinned() | returning

    def _answer_backward(self, action: act.AnswerBackward) -> None:
        session = self._sessions.find(action.session)
        checkpoint = self._ledger.begun(session.key) if session is not None else 0
        self._reply(action.session, action.request, self._desk.grad(action, checkpoint))

    def _answer_round(self, action: act.AnswerRound) -> None:
        published = m.Published(action.version, action.round, int(action.over))
        self._reply(action.session, action.request, published)

    def _on_compute(self, event: Report) -> None:
        if isinstance(event, Failure):
            self._failure = event.error
            return
        if isinstance(event, CheckpointWritten):
            self._ledger.written(event)
            self._checkpoint_at = self._clock() + self._checkpoint_s
            return
        self._figures.ended()
        if isinstance(event, ev.BackwardDone):
            self._figures.stepped(event)
            self._ledger.stepped(event, self._sessions)
        elif isinstance(event, ev.RoundPublished):
            self._ledger.published()
            self._filing.run(partial(self._desk.round_over, self._scheduler.state.round + 1))
        self._decide(event)

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
        state = self._scheduler.state
        return self._desk.description(state.version, state.round)

    def _pong(self) -> m.Pong:
        state = self._scheduler.state
        return m.Pong(
            joined=len(state.active),
            cohort=state.cohort,
            round=state.round,
            step=state.hub_step,
            adapter_version=state.version,
            queue=len(state.infers),
            stopping=int(self._stopping.is_set()),
            busy_s=int(self._figures.overdue_s),
        )

    def _uploaded(
        self, session: Session, request: int, round_: int, answer: m.AnyMessage, adapter: EdgeAdapter | None
    ) -> None:
        if adapter is not None:
            # An edge weighs what the hub saw of it, whatever it claims.
            seen = self._ledger.round_tokens(session.key)
            adapter = replace(adapter, tokens=min(adapter.tokens, seen))
            self._decide(ev.AdapterUploaded(session.seat, round_, adapter))
        self._post.answer(session, request, answer)

    def _reply(self, seat: int, request: int, message: m.AnyMessage) -> None:
        session = self._sessions.find(seat)
        if session is not None:
            self._post.answer(session, request, message)

    # -- time ------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        now = self._clock()
        self._tick_at = now + _TICK_S
        for session in self._sessions:
            quiet = now - session.heard_at
            if session.routes:
                session.owed_at = now
            elif session.train and min(quiet, now - session.owed_at) > self._grace_s and not session.silent:
                session.silent = True
                self._decide(ev.EdgeFellSilent(session.seat))
            if quiet > (_TRAIN_SILENCE_S if session.train else _INFER_SILENCE_S) and quiet > self._grace_s:
                self._close(session, f"nothing heard for {quiet:.0f} s")
        if now >= self._checkpoint_at:
            self._checkpoint_at = math.inf
            self._decide(ev.CheckpointDue())
        if self._state.access.refresh():
            for session in self._sessions:
                if self._state.access.name_by_origin(session.key) is None:
                    self._door.shut_out(session)
                    self._close(session, "its key is revoked")
        if now >= self._seen_at:
            self._seen_at = now + _SEEN_S
            seen = {session.key for session in self._sessions if now - session.heard_at < _SEEN_S}
            self._filing.run(partial(self._state.access.record_seen, seen))
        self._door.tick()
        self._watch.look(self._sessions, self._scheduler.state, self._figures.overdue_s)
        if now >= self._snapshot_at:
            # Drawing thousands of edges takes its time, so it is done more seldom then.
            self._snapshot_at = now + min(len(self._sessions) * _SNAPSHOT_S_PER_SESSION, _SNAPSHOT_MOST_S)
            self.snapshot = self._figures.snapshot(self)
