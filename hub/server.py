"""The hub's I/O loop: reads what arrives, lets the scheduler decide, sends what it says.

startup, main_loop and shutdown tell the whole story. The loop owns the sockets and the sessions; tensors are
computed by the worker's thread, files are read and hashed by a helper thread.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import messaging.messages as m
from hub.desk import Desk
from hub.figures import Figures
from hub.filing import Filing
from hub.jobs import EdgeAdapter, StepItem
from hub.library import Library
from hub.monitor import HubSnapshot
from hub.post import Post, error, refusal
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import State
from hub.sessions import Session, Sessions
from hub.store.state import HubState
from hub.worker import Failure, Progress, Worker
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, HubError, ProtocolError, Refused, VersionMismatch
from messaging.framing import decode
from messaging.replies import Busy, Gap, New, Replay, Stale
from messaging.transport import Arrival, Channel, HubSide, Route

_TICK_S = 0.5
_PARKED_S = 0.02
_INFER_SILENCE_S = 120.0
_FLUSH_S = 3.0
#: Silent training sessions are forgotten after this; their edges may come back all the same.
_TRAIN_SILENCE_S = 600.0
_SEEN_S = 60.0


class Server:
    """Everything of a hub but the command line. `run` returns when `stop` was called, or raises."""

    def __init__(
        self,
        transport: HubSide,
        state: HubState,
        library: Library,
        worker_of: Callable[[Callable[[ev.Event | Failure], None]], Worker],
        scheduler_state: State,
        desk: Desk,
        journal: Journal,
        grace_s: float,
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
        self._post = Post(transport, desk.epoch, desk.credit_bytes)
        self._filing = Filing(library, desk, journal, self._from_thread)
        self._sessions = Sessions(desk.epoch)
        self._applied = dict(desk.applied)
        #: who is inside the joined step that is computed now: session -> (key, steps applied when it is done, tokens)
        self._stepping: dict[int, tuple[str, int, int]] = {}
        #: target tokens of each edge's applied steps in the open round: the most that its adapter may weigh
        self._round_tokens: dict[str, int] = dict(desk.round_tokens)
        self._stopping = threading.Event()
        self._tick_at = clock()
        self._seen_at = clock() + _SEEN_S
        self._failure: BaseException | None = None
        self._figures = Figures(clock)
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
            wait = _PARKED_S if self._post.waiting else max(self._tick_at - self._clock(), 0.0)
            for arrival in self._transport.poll(wait):
                self._arrived(arrival)
            while not self._inbox.empty():
                self._inbox.get()()
            if self._post.waiting:
                self._post.send_parked()
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
            self._worker.save(self._progress())
            step = self._scheduler.state.hub_step
            self._journal.log(f"checkpoint written at step {step}; start `hub serve` with the same --state to go on")

    def _from_thread(self, job: Callable[[], None]) -> None:
        """Have the loop run `job`; for other threads."""
        self._inbox.put(job)
        self._transport.wake()

    # -- arrivals ------------------------------------------------------------------------------------

    def _arrived(self, arrival: Arrival) -> None:
        if arrival.route.channel is Channel.ENROL:
            self._enrol(arrival)
            return
        name = self._state.access.name_of(arrival.key)
        if name is None:
            self._cut_off(arrival.key, "its key is revoked")
            self._post.reply(arrival.route, 0, error(ErrorCode.NOT_ENROLLED, "this edge's key was revoked at the hub"))
            return
        try:
            packet = decode(arrival.frames, m.TO_HUB)
        except ProtocolError as fault:
            self._figures.refused += 1
            code = ErrorCode.VERSION if isinstance(fault, VersionMismatch) else ErrorCode.PROTOCOL
            self._post.reply(arrival.route, 0, refusal(fault, code))
            return
        size = sum(len(frame) for frame in arrival.frames)
        try:
            self._take(arrival.key, name, arrival.route, packet, size)
        except FedseaError as fault:
            envelope = packet.envelope
            self._post.reply(arrival.route, envelope.request, refusal(fault), envelope.session)

    def _take(self, key: str, name: str, route: Route, packet: m.Packet, size: int) -> None:
        message, envelope = packet.message, packet.envelope
        match message:
            case m.Describe():
                self._post.reply(route, envelope.request, self._describe(message))
            case m.Fetch():
                self._filing.fetch(message, partial(self._post.reply, route, envelope.request))
            case m.Hello():
                self._hello(key, name, route, envelope.request, message)
            case _:
                self._take_in_session(key, route, packet, size)

    def _take_in_session(self, key: str, route: Route, packet: m.Packet, size: int) -> None:
        envelope = packet.envelope
        session = self._sessions.get(envelope.session, key)
        if session is None or envelope.epoch != self._desk.epoch:
            raise HubError(ErrorCode.NO_SESSION, "the hub has no such session: it was restarted, or the session ended")
        self._heard(session)
        match packet.message:
            case m.Ping():
                session.ping = packet.message
                self._post.tell(session, route, envelope.request, self._pong())
            case m.CloseStream():
                self._decide(ev.StreamClosed(session.number, packet.message.stream))
            case _:
                session.replies.ack(envelope.ack)
                if self._admit(session, route, packet, size):
                    self._begin(session, packet)

    def _admit(self, session: Session, route: Route, packet: m.Packet, size: int) -> bool:
        """Whether a request is to be carried out; duplicates are answered from the record."""
        request = packet.envelope.request
        match session.replies.admit(request):
            case New():
                if session.outstanding and session.outstanding + size > self._desk.credit_bytes:
                    self._close(session, "it sent more than its credits allow")
                    return False
                session.outstanding += size
                session.routes[request] = (route, size)
                return True
            case Replay(frames):
                self._post.replay(route, frames)
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
                self._decide(ev.EdgeLeft(session.number, bool(message.done)))
                self._post.answer(session, request, m.Bye())
                if not message.done:
                    self._decide(ev.EdgeGone(session.number))
                    self._sessions.remove(session.number)
            case _ if event is not None:
                self._decide(event)

    def _enrol(self, arrival: Arrival) -> None:
        try:
            packet = decode(arrival.frames, m.ENROL_TO_HUB)
        except VersionMismatch as fault:
            self._post.reply(arrival.route, m.UNORDERED_BASE, error(ErrorCode.VERSION, str(fault)))
            return
        except ProtocolError:
            self._figures.refused += 1
            return
        message = packet.message
        assert isinstance(message, m.Enrol)
        answer: m.AnyMessage
        try:
            answer = m.Enrolled(self._state.access.enrol(message.token, arrival.key, message.name))
            self._journal.log(f"{answer.name} enrolled")
        except Refused as fault:
            answer = error(ErrorCode.TOKEN, str(fault))
            self._journal.log(f"enrolment of {message.name!r} refused: {fault}")
        self._post.reply(arrival.route, packet.envelope.request, answer)

    # -- sessions ------------------------------------------------------------------------------------

    def _hello(self, key: str, name: str, route: Route, request: int, hello: m.Hello) -> None:
        scheduler = self._scheduler.state
        resumed = self._sessions.get(hello.resume, key) if hello.resume else None
        if resumed is None:
            place = self._desk.check_hello(hello)
            if hello.train:
                for old in self._sessions.of_key(key):
                    if old.train:
                        self._close(old, "it joined again")
            session = Session(
                number=self._sessions.number(),
                key=key,
                name=name,
                train=bool(hello.train),
                partition=(hello.p, hello.q),
                place=place,
                version=None if hello.train else scheduler.version,
                replies=self._desk.new_replies(),
                heard_at=self._clock(),
                applied=self._applied.get(key, 0),
            )
            self._sessions.add(session)
            self._decide(ev.EdgeJoined(session.number, name, session.train, session.applied))
        else:
            session = resumed
            self._heard(session)
        welcome = self._desk.welcome(session, scheduler.version, scheduler.round)
        self._post.tell(session, route, request, welcome)
        self._filing.run(partial(self._state.access.record_seen, [key]))

    def _heard(self, session: Session) -> None:
        session.heard_at = self._clock()
        if session.silent:
            session.silent = False
            self._decide(ev.EdgeCameBack(session.number))

    def _close(self, session: Session, why: str) -> None:
        self._journal.log(f"{session.name}: session closed: {why}")
        self._sessions.remove(session.number)
        self._decide(ev.EdgeGone(session.number))

    def _cut_off(self, key: str, why: str) -> None:
        for session in self._sessions.of_key(key):
            self._close(session, why)

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
                        self._stepping = self._inside(action)
                    self._figures.began(action)
                    self._worker.put(action, self._progress(), self._sessions.pinned())

    def _inside(self, action: act.RunForward) -> dict[int, tuple[str, int, int]]:
        inside = [(self._sessions.find(number), item) for number, item in action.payloads]
        return {
            session.number: (session.key, session.applied + 1, item.tokens)
            for session, item in inside
            if session is not None and isinstance(item, StepItem)
        }

    def _answer_backward(self, action: act.AnswerBackward) -> None:
        session = self._sessions.find(action.session)
        if session is not None and isinstance(action.answer, m.Tensor):
            session.applied = action.step + 1
        self._reply(action.session, action.request, self._desk.grad(action))

    def _answer_round(self, action: act.AnswerRound) -> None:
        published = m.Published(action.version, action.round, int(action.over))
        self._reply(action.session, action.request, published)

    def _on_compute(self, event: ev.Event | Failure) -> None:
        if isinstance(event, Failure):
            self._failure = event.error
            return
        if isinstance(event, ev.BackwardDone):
            # The optimizer has stepped whether or not the edge is still there to hear of it.
            self._figures.stepped(event)
            for session, answer in event.answers.items():
                if isinstance(answer, m.Tensor) and session in self._stepping:
                    key, applied, tokens = self._stepping[session]
                    self._applied[key] = applied
                    self._round_tokens[key] = self._round_tokens.get(key, 0) + tokens
        elif isinstance(event, ev.RoundPublished):
            self._round_tokens = {}
        self._decide(event)

    def _progress(self) -> Progress:
        state = self._scheduler.state
        return Progress(
            state.hub_step, state.round, state.round_step, state.version, dict(self._applied), dict(self._round_tokens)
        )

    # -- answers ---------------------------------------------------------------------------------------

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
        )

    def _uploaded(
        self, session: Session, request: int, round_: int, answer: m.AnyMessage, adapter: EdgeAdapter | None
    ) -> None:
        if adapter is not None:
            # An edge weighs what the hub saw of it, whatever it claims.
            seen = self._round_tokens.get(session.key, 0)
            adapter = replace(adapter, tokens=min(adapter.tokens, seen))
            self._decide(ev.AdapterUploaded(session.number, round_, adapter))
        self._post.answer(session, request, answer)

    def _reply(self, number: int, request: int, message: m.AnyMessage) -> None:
        session = self._sessions.find(number)
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
                self._decide(ev.EdgeFellSilent(session.number))
            if quiet > (_TRAIN_SILENCE_S if session.train else _INFER_SILENCE_S) and quiet > self._grace_s:
                self._close(session, f"nothing heard for {quiet:.0f} s")
        if self._state.access.refresh():
            for session in self._sessions:
                if self._state.access.name_of(session.key) is None:
                    self._close(session, "its key is revoked")
        if now >= self._seen_at:
            self._seen_at = now + _SEEN_S
            seen = {session.key for session in self._sessions if now - session.heard_at < _SEEN_S}
            self._filing.run(partial(self._state.access.record_seen, seen))
        self.snapshot = self._figures.snapshot(self)
