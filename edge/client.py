"""The edge's side of the link: one thread owns the sockets, everybody else hands it work and waits on a future."""

from __future__ import annotations

import math
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import messaging.messages as m
from messaging.console import Journal
from messaging.errors import ErrorCode, FedseaError, HubError, HubUnreachable, LinkLost, ProtocolError, Refused
from messaging.exchange import Answered, Failed
from messaging.framing import decode
from messaging.liveness import Liveness
from messaging.requests import Requests, Session
from messaging.transport import Buffer, Connected, ConnectFailed, Disconnected, EdgeSide, FailReason

M = TypeVar("M", bound=m.Message)

_LONGEST_WAIT_S = 0.25
_SILENT_S = 10.0
_WRONG_KEY_TRIES = 3
_RESET_S = 1.0


@dataclass
class LinkFigures:
    """What the edge's screen shows of the link; written by the network thread alone."""

    round_trip_s: float | None = None
    heard_at: float = 0.0
    #: what the hub said of itself last
    pong: m.Pong | None = None
    connected: bool = False
    round_trips: int = 0


class HubClient:
    """Asks the hub. `submit` may be called from any thread; the network thread does the rest.

    give_up_s: seconds of silence after which everything that is asked fails with HubUnreachable.
    """

    def __init__(
        self,
        transport: EdgeSide,
        journal: Journal,
        give_up_s: float = 30.0,
        rng: random.Random | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._journal = journal
        self._clock = clock
        rng = rng or random.Random()
        self._requests = Requests(rng, give_up_s)
        self._liveness = Liveness(rng, clock())
        self._inbox: queue.SimpleQueue[tuple[m.AnyMessage, Future[m.AnyMessage], float]] = queue.SimpleQueue()
        self._loose: queue.SimpleQueue[m.AnyMessage] = queue.SimpleQueue()
        self._futures: dict[int, Future[m.AnyMessage]] = {}
        self._hello: m.Hello | None = None
        self._hello_request: int | None = None
        self._reopening = False
        self._ping_ids: dict[int, float] = {}
        self._silence_told = False
        self._wrong_keys = 0
        #: why the hub takes no connection; whatever is asked from then on fails with it
        self._refusal: Refused | None = None
        self._reset_at: float | None = None
        self._stopping = threading.Event()
        self._session_changed = threading.Condition()
        #: the WELCOME of the session that is open; it changes when the hub was restarted
        self.welcome: m.Welcome | None = None
        self.session = 0
        #: what the next Ping says of this edge; set by whoever knows
        self.status = m.Ping("joining", 0, 0.0, 0.0, 0.0, 0.0, None)
        #: steps of this edge whose results it holds; told when a session is reopened
        self.steps_done = 0
        self.figures = LinkFigures(heard_at=clock())
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
        return self.ask(hello, m.Welcome)

    def where(self) -> m.Welcome:
        """The WELCOME of this session as of now: it tells which of this edge's steps the hub has applied."""
        assert self._hello is not None
        return self.ask(replace(self._hello, resume=self.session, steps_done=self.steps_done), m.Welcome)

    def wait_for_session(self, timeout_s: float) -> m.Welcome:
        """The WELCOME of a session that is open now. Raises HubUnreachable when there is none in time."""
        with self._session_changed:
            if not self._session_changed.wait_for(lambda: not self._reopening, timeout_s) or self.welcome is None:
                raise HubUnreachable(f"the hub did not come back within {timeout_s:.0f} s")
            return self.welcome

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
        if self._requests.needs_session and self.session and self._hello_request is None and self._hello is not None:
            self._reopen(now)

    def _reopen(self, now: float) -> None:
        assert self._hello is not None
        hello = replace(self._hello, resume=self.session, steps_done=self.steps_done)
        self._reopening = True
        self._hello_request = self._requests.add(hello, now)

    def _send_due(self, now: float) -> None:
        for out in self._requests.due(now):
            if self._transport.send(out.channel, out.frames):
                self._requests.sent(out.request, now)
            else:
                self._requests.blocked(out.channel, now)
        if self.session and not self._requests.needs_session and self._liveness.ping_due(now):
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
            self.figures.pong = packet.message
            self._liveness.resize(packet.message.joined)
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
            self._reopening = False
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
                self.figures.connected, self._wrong_keys, self._refusal = True, 0, None
                self._requests.connected(channel, now)
                self._liveness.restart(now)
            case Disconnected():
                self.figures.connected = False
                self._journal.log("the connection to the hub is lost: dialling again")
            case ConnectFailed(_, FailReason.NOT_ENROLLED as reason):
                self._refused(reason)
            case ConnectFailed(_, FailReason.WRONG_HUB_KEY as reason):
                # A hub that is just stopping may look like this once.
                self._wrong_keys += 1
                if self._wrong_keys >= _WRONG_KEY_TRIES:
                    self._refused(reason)
            case ConnectFailed(_, FailReason.HUB_TROUBLE):
                # After a refusal a socket never dials again by itself.
                self._reset_at = now + _RESET_S

    def _refused(self, reason: FailReason) -> None:
        self._refusal = Refused(reason.value)
        for failed in self._requests.fail_all(self._refusal):
            self._fail(failed)

    def _watch(self, now: float) -> None:
        """Tell of silence once, and of its end; dial afresh where the socket will not."""
        if self._reset_at is not None and now >= self._reset_at:
            self._reset_at = None
            self._transport.reset()
        silent = now - self.figures.heard_at
        waiting = bool(self._futures)
        if silent > _SILENT_S and waiting and not self._silence_told:
            self._silence_told = True
            self._journal.log(f"hub silent for {silent:.0f} s, retrying")
        elif self._silence_told and silent < _SILENT_S:
            self._silence_told = False
            self._journal.log("the hub answers again")

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
