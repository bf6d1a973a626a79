"""The edge's side of the link: one thread owns the sockets, everybody else hands it work and waits on a future."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TypeVar

import messaging.messages as m
from edge.link import LinkFigures, LinkWatch
from edge.membership import HubKey
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, HubError, HubUnreachable, LinkLost, ProtocolError, Refused
from messaging.exchange import Answered, Failed
from messaging.framing import decode
from messaging.liveness import Liveness
from messaging.requests import Requests, Session
from messaging.transport import Buffer, Channel, Connected, ConnectFailed, Disconnected, EdgeSide, FailReason, Reachable

M = TypeVar("M", bound=m.Message)
#: What makes sense only where the hub stands as it did when it was decided.
_TRAINING = (m.StepForward, m.StepBackward, m.Upload, m.AwaitRound)

_LONGEST_WAIT_S = 0.25
_WRONG_KEY_TRIES = 3
#: How long a socket that was refused for the hub's own trouble stays away, at first and at most.
_RESET_S, _RESET_MOST_S = 0.5, 10.0
_OTHER_KEY_S = 0.25


class HubClient:
    """Asks the hub. `submit` may be called from any thread; the network thread does the rest.

    give_up_s: seconds of silence after which everything that is asked fails with HubUnreachable; inf for never.
    A hub that has missed three pings is dialled afresh, again and again, and asked once more what is open.
    """

    def __init__(
        self,
        transport: EdgeSide,
        journal: Journal,
        give_up_s: float = 30.0,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
        hub_key: HubKey | None = None,
    ) -> None:
        self._transport = transport
        self._hub_key = hub_key
        self._journal = journal
        self._clock = clock
        self._rng = rng = rng or random.Random()
        self._requests = Requests(rng, give_up_s)
        self._liveness = Liveness(rng, clock())
        self._inbox: queue.SimpleQueue[tuple[m.AnyMessage, Future[m.AnyMessage], float]] = queue.SimpleQueue()
        self._loose: queue.SimpleQueue[m.AnyMessage] = queue.SimpleQueue()
        self._futures: dict[int, Future[m.AnyMessage]] = {}
        self._hello: m.Hello | None = None
        self._hello_request: int | None = None
        self._reopening = False
        self._ping_ids: dict[int, float] = {}
        self._wrong_keys = 0
        #: why the hub takes no connection or session; whatever is asked from then on fails with it
        self._refusal: FedseaError | None = None
        #: when to dial afresh after a refusal, and how many of these came in a row
        self._reset_at: float | None = None
        self._troubles = 0
        self._stopping = threading.Event()
        self._session_changed = threading.Condition()
        #: the WELCOME of the session that is open; it changes when the hub was restarted
        self.welcome: m.Welcome | None = None
        self.session = 0
        #: the session that training goes on in
        self._adopted = 0
        #: what the next Ping says of this edge; set by whoever knows
        self.status = m.Ping("joining", 0, 0.0, 0.0, 0.0, 0.0, None)
        self.figures = LinkFigures(heard_at=clock())
        self._link = LinkWatch(journal, self.figures, clock)
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    # -- for any thread ------------------------------------------------------------------------------

    def submit(self, message: m.AnyMessage, deadline_s: float = math.inf) -> Future[m.AnyMessage]:
        """Ask; the future holds the answer, or the FedseaError that ended the request."""
        future: Future[m.AnyMessage] = Future()
        self._inbox.put((message, future, deadline_s))
        self._transport.wake()
        if not self._thread.is_alive():
            self._fail_inbox()
        return future

    def ask(self, message: m.AnyMessage, answer: type[M], deadline_s: float = math.inf) -> M:
        """Ask and wait. Raises what ended the request if that is not an answer of type `answer`."""
        future = self.submit(message, deadline_s)
        while True:
            try:
                # Waking now and then lets Ctrl-C through on every platform.
                reply = future.result(timeout=1.0)
                break
            except TimeoutError:
                if future.done():
                    raise
        if not isinstance(reply, answer):
            raise ProtocolError(f"the hub answered with {type(reply).__name__}")
        return reply

    def tell(self, message: m.AnyMessage) -> None:
        """Send once, without an answer (CloseStream). Never blocks or raises: the garbage collector may call it."""
        self._loose.put(message)

    def open(self, hello: m.Hello) -> m.Welcome:
        """Open a session; from here on it is reopened by itself when the hub forgot it."""
        self._hello = hello
        self.ask(hello, m.Welcome)
        return self.adopt()

    def where(self) -> m.Welcome:
        """The WELCOME of this session as of now: it tells which of this edge's steps the hub has applied."""
        assert self._hello is not None
        return self.ask(replace(self._hello, resume=self.session), m.Welcome)

    def adopt(self) -> m.Welcome:
        """The WELCOME of the session that is open now, however long that takes; training goes on in this session.

        Until it is adopted, what belongs to training fails with LinkLost in a session that was opened meanwhile:
        the hub may stand elsewhere now, and the asker has to stand there first.
        """
        while True:
            welcome = self.wait_for_session(math.inf)
            with self._session_changed:
                if welcome is self.welcome:
                    self._adopted = self.session
                    return welcome

    @property
    def adopted(self) -> bool:
        """Whether the session that is open is the one that training goes on in."""
        return self._adopted == self.session

    def wait_for_session(self, timeout_s: float) -> m.Welcome:
        """The WELCOME of a session that is open now. Raises HubUnreachable when there is none in time."""
        deadline = self._clock() + timeout_s
        with self._session_changed:
            while self._reopening and self._refusal is None and not self._stopping.is_set():
                left = deadline - self._clock()
                if left <= 0:
                    raise HubUnreachable(f"the hub did not come back within {timeout_s:.0f} s")
                # Waking now and then lets Ctrl-C through on every platform.
                self._session_changed.wait(min(left, 1.0))
            if self._refusal is not None:
                raise self._refusal
            if self.welcome is None or self._stopping.is_set():
                raise _closed()
            return self.welcome

    def be_patient(self, give_up_s: float) -> None:
        """From now on it takes so many seconds of silence until what is asked fails; inf for never."""
        self._requests.give_up_s = give_up_s

    @property
    def credits(self) -> int:
        """Bytes of requests that may be unanswered at a time."""
        return self._requests.session.credits

    @property
    def trouble(self) -> str:
        """What is wrong with the hub just now, in words for the screen; empty when all is well."""
        return self._link.trouble

    def close(self) -> None:
        """End the thread and the connections; whatever is still asked fails with LinkLost."""
        self._stopping.set()
        self._transport.wake()
        self._thread.join()

    # -- the network thread ---------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                now = self._clock()
                self._take_work(now)
                self._send_due(now)
                for _, frames in self._transport.poll(self._wait(now)):
                    self._received(frames)
                for event in self._transport.link_events():
                    self._link_event(event)
                now = self._clock()
                for failed in self._requests.expired(now):
                    self._fail(failed)
                self._watch(now)
            self._send_due(self._clock())
        finally:
            for failed in self._requests.fail_all(_closed()):
                self._fail(failed)
            self._fail_inbox()
            self._transport.close()

    def _fail_inbox(self) -> None:
        while not self._inbox.empty():
            self._inbox.get()[1].set_exception(_closed())

    def _wait(self, now: float) -> float:
        if not self._inbox.empty():
            return 0.0
        return min(max(self._requests.next_event() - now, 0.0), _LONGEST_WAIT_S)

    def _take_work(self, now: float) -> None:
        while not self._inbox.empty():
            message, future, deadline_s = self._inbox.get()
            if self._refusal is not None:
                future.set_exception(self._refusal)
                continue
            training = isinstance(message, _TRAINING) or (isinstance(message, m.Leave) and message.done)
            if training and not self.adopted:
                future.set_exception(LinkLost("the session that this belongs to has ended"))
                continue
            try:
                number = self._requests.add(message, now, deadline_s)
            except (FedseaError, RuntimeError) as error:
                future.set_exception(error)
                continue
            self._futures[number] = future
            if isinstance(message, m.Hello):
                self._hello_request = number
            elif isinstance(message, m.Leave) and not message.done:
                # What is still asked in this session is refused now, and must not open another one.
                self._hello = None
        while not self._loose.empty():
            message = self._loose.get()
            if self.session:
                out = self._requests.stamp(message)
                self._transport.send(out.channel, out.frames)
        lost = self._requests.needs_session and self.session
        if lost and self._hello is not None and self._hello_request is None and self._refusal is None:
            self._reopen(now)

    def _reopen(self, now: float) -> None:
        assert self._hello is not None
        # A generation goes on with the adapter that it began with, also at a hub that was restarted.
        version = -1 if self._hello.train or self.welcome is None else self.welcome.adapter_version
        hello = replace(self._hello, resume=self.session, version=version)
        self._reopening = True
        self._hello_request = self._requests.add(hello, now)

    def _send_due(self, now: float) -> None:
        for out in self._requests.due(now):
            if self._transport.send(out.channel, out.frames):
                self._requests.sent(out.request, now)
            else:
                self._requests.blocked(out.channel, now)
        if self._liveness.ping_due(now):
            out = self._requests.stamp(self.status)
            self._ping_ids = {out.request: now}
            self._transport.send(out.channel, out.frames)
            self._liveness.pinged(now)

    def _received(self, frames: list[Buffer]) -> None:
        now = self._clock()
        self._liveness.heard()
        self.figures.heard_at = now
        try:
            packet = decode(frames, m.TO_EDGE)
        except ProtocolError as error:
            self._journal.log(f"the hub sent what this edge cannot read: {error}")
            for failed in self._requests.fail_all(error):
                self._fail(failed)
            return
        if isinstance(packet.message, m.Pong):
            sent = self._ping_ids.pop(packet.envelope.request, None)
            if sent is not None:
                self.figures.round_trip_s = now - sent
            self.figures.pong, self.figures.pong_at = packet.message, now
            self._liveness.resize(packet.message.sessions)
        if isinstance(packet.message, m.NextHubKey) and self._hub_key is not None:
            self._hub_key.announced(packet.message.key)
        if isinstance(packet.message, m.Welcome) and packet.envelope.request == self._hello_request:
            self._welcomed(packet)
        outcome = self._requests.received(packet, now)
        if isinstance(outcome, Answered):
            self.figures.round_trips += 1
            future = self._futures.pop(outcome.request, None)
            if future is not None:
                future.set_result(outcome.message)
        elif isinstance(outcome, Failed):
            self._fail(outcome)

    def _welcomed(self, packet: m.Packet) -> None:
        welcome, envelope = packet.message, packet.envelope
        assert isinstance(welcome, m.Welcome)
        self._hello_request = None
        session = Session(envelope.session, envelope.epoch, welcome.credit_bytes, welcome.next)
        if self.session and self.session != envelope.session:
            self._journal.log("the hub was restarted: a new session is open")
        for failed in self._requests.opened(session):
            self._fail(failed)
        with self._session_changed:
            self.session, self.welcome, self._reopening = envelope.session, welcome, False
            self._session_changed.notify_all()

    def _fail(self, failed: Failed) -> None:
        if failed.request == self._hello_request:
            self._hello_request = None
            if self._reopening and not isinstance(failed.error, HubUnreachable):
                self._refuse(failed.error)
        future = self._futures.pop(failed.request, None)
        if future is not None:
            future.set_exception(failed.error)
        elif failed.request == 0:
            for other in self._requests.fail_all(_told(failed.error)):
                self._fail(other)

    def _link_event(self, event: object) -> None:
        now = self._clock()
        match event:
            case Connected(channel):
                self._wrong_keys, self._refusal = 0, None
                if self._hub_key is not None and channel is Channel.CTL:
                    self._hub_key.proved()
                self._requests.connected(channel, now)
                if channel is Channel.CTL:
                    self.figures.connected, self._troubles = True, 0
                    self._liveness.restart(now)
            case Disconnected(channel):
                if channel is Channel.CTL:
                    self.figures.connected = False
                    self._journal.log("the connection to the hub is lost: dialling again")
            case Reachable():
                self._dial_afresh(now)
            case ConnectFailed(_, FailReason.NOT_ENROLLED as reason):
                self._refuse(Refused(reason.value))
            case ConnectFailed(channel, FailReason.WRONG_HUB_KEY as reason):
                self._wrong_hub_key(channel, reason, now)
            case ConnectFailed(_, FailReason.HUB_TROUBLE):
                # After a refusal a socket never dials again by itself.
                if self._reset_at is None:
                    longest = min(_RESET_MOST_S, _RESET_S * 2.0 ** min(self._troubles, 10))
                    self._reset_at, self._troubles = now + self._rng.uniform(0.0, longest), self._troubles + 1

    def _wrong_hub_key(self, channel: Channel, reason: FailReason, now: float) -> None:
        """Try the key that the hub has announced, if it has; else give up on a hub that was never proved."""
        tries = _WRONG_KEY_TRIES
        if channel is Channel.CTL and self._reset_at is None and self._hub_key is not None:
            other = self._hub_key.other()
            if other is not None:
                self._transport.use_key(other)
                self._reset_at = now + _OTHER_KEY_S
                tries *= 2
        # A hub that is just stopping may look like this once; and one whose key was proved once is no other.
        if not self.session:
            self._wrong_keys += 1
            if self._wrong_keys >= tries:
                self._refuse(Refused(reason.value))

    def _refuse(self, error: FedseaError) -> None:
        """Nothing will come of this hub any more: end what is asked, and tell those who wait for a session."""
        with self._session_changed:
            self._refusal = error
            self._session_changed.notify_all()
        for failed in self._requests.fail_all(error):
            self._fail(failed)

    def _dial_afresh(self, now: float) -> None:
        """Fresh sockets; then a HELLO that resumes the session, and everything that is open once more."""
        self._reset_at = None
        self.figures.connected = False
        self._transport.reset()
        self._requests.reset()
        self._liveness.restart(now)

    def _watch(self, now: float) -> None:
        """Tell of a silent hub, and dial afresh where the sockets would not, or have not noticed."""
        if self._liveness.dead(now) or (self._reset_at is not None and now >= self._reset_at):
            self._dial_afresh(now)
        self._link.look(self._liveness.quiet_s)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received, framing and encryption included."""
        return self._transport.traffic.sent, self._transport.traffic.received


def _closed() -> LinkLost:
    return LinkLost("the connection to the hub was closed")


def _told(error: FedseaError) -> FedseaError:
    """A refusal that names no request, in words for the user."""
    if isinstance(error, HubError) and error.code is ErrorCode.VERSION:
        return Refused(str(error))
    return error
