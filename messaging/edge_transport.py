"""The edge's side of the link over ZeroMQ: one DEALER socket per channel, CURVE on all of them."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Sequence
from dataclasses import replace

import zmq
from zmq.utils.monitor import parse_monitor_message

from messaging.joining import HubAddress
from messaging.keys import KeyPair
from messaging.knock import Knocker
from messaging.sockets import PORTION, Context, Socket, Waker, milliseconds, readable, set_common_options
from messaging.transport import (
    Buffer,
    Channel,
    Connected,
    ConnectFailed,
    Disconnected,
    FailReason,
    LinkEvent,
    Reachable,
    Traffic,
    wire_bytes,
)

_RECONNECT_MS = 250
_RECONNECT_MOST_MS = 10_000
_CONNECT_MS = 5_000
#: How long a dial may go without an answer before it is worth while to look for the hub beside it.
_KNOCK_AFTER_S = 0.5
_WATCHED = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_DISCONNECTED
)


class Connection:
    """One DEALER socket and the monitor that tells what becomes of its connection."""

    def __init__(self, context: Context, hub: HubAddress, keys: KeyPair, channel: Channel) -> None:
        self.channel = channel
        self.sock: Socket = context.socket(zmq.DEALER)
        set_common_options(self.sock, channel)
        self.sock.setsockopt(zmq.IPV6, 1)
        self.sock.setsockopt(zmq.IMMEDIATE, 1)
        self.sock.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
        self.sock.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MOST_MS)
        self.sock.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
        self.sock.setsockopt(zmq.CURVE_SERVERKEY, hub.key.encode())
        self.sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        self.sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self.monitor: Socket = self.sock.get_monitor_socket(_WATCHED)
        self._up = False
        self._answered = False
        #: a dial is under way, or about to be, and nothing has answered yet
        self.dialling = True
        self.sock.connect(hub.endpoint(channel))

    def receive(self) -> list[list[Buffer]]:
        """A portion of what waits here, when something does."""
        messages = [self._receive_one()]
        while len(messages) < PORTION[self.channel] and readable(self.sock):
            messages.append(self._receive_one())
        return messages

    def events(self) -> list[LinkEvent]:
        """What happened since the last call."""
        found: list[LinkEvent] = []
        while readable(self.monitor):
            message = parse_monitor_message(self.monitor.recv_multipart())
            event = self._interpret(message["event"], message["value"])
            if event is not None:
                found.append(event)
        return found

    def close(self) -> None:
        """Give the sockets back; what was not sent yet is lost."""
        self.sock.disable_monitor()
        self.monitor.close()
        self.sock.close()

    def _receive_one(self) -> list[Buffer]:
        """One message. Its tensor frames stay where libzmq put them; the header is copied."""
        frame = self.sock.recv(copy=False)
        frames: list[Buffer] = [frame.bytes]
        while frame.more:
            frame = self.sock.recv(copy=False)
            frames.append(frame.buffer)
        return frames

    def _interpret(self, event: int, value: int) -> LinkEvent | None:
        """libzmq's monitor event in our words; None for those that add nothing."""
        match event:
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._up = True
                return Connected(self.channel)
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                reason = FailReason.NOT_ENROLLED if value == 400 else FailReason.HUB_TROUBLE
                return ConnectFailed(self.channel, reason)
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return ConnectFailed(self.channel, FailReason.WRONG_HUB_KEY)
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                # A hub that cannot open our greeting hangs up; one that never answers runs into the timeout.
                silent = value == errno.EAGAIN
                return ConnectFailed(self.channel, FailReason.UNREACHABLE if silent else FailReason.WRONG_HUB_KEY)
            case zmq.EVENT_CONNECTED:
                self._answered, self.dialling = True, False
            case zmq.EVENT_CONNECT_RETRIED:
                self.dialling = True
                answered, self._answered = self._answered, False
                return None if answered else ConnectFailed(self.channel, FailReason.UNREACHABLE)
            case zmq.EVENT_DISCONNECTED if self._up:
                self._up, self.dialling = False, True
                return Disconnected(self.channel)
        return None


class EdgeTransport:
    """Connects to a hub; see `EdgeSide`. Owned by the thread that polls it; only `wake` is for others.

    CTL is dialled at once, BULK when something is sent on it for the first time. Enrolment goes through
    `enrol.py` instead. A lost connection is dialled again every 0.25 s to 10 s, but a refused key
    (ConnectFailed with NOT_ENROLLED or HUB_TROUBLE) ends its socket for good: `reset` makes new ones. While
    nothing answers at all, a `Knocker` finds out sooner than those dials that the hub is there again.
    """

    def __init__(self, hub: HubAddress, keys: KeyPair) -> None:
        self.traffic = Traffic()
        self._hub = hub
        self._keys = keys
        self._context: Context = zmq.Context()
        self._waker = Waker()
        self._events: list[LinkEvent] = []
        self._connections: dict[Channel, Connection] = {}
        self._knocker: Knocker | None = None
        #: since when CTL is dialled without an answer, and how long to leave that alone
        self._dialling_since = math.inf
        self._knock_after_s = _KNOCK_AFTER_S
        self._start()

    def poll(self, timeout_s: float) -> list[tuple[Channel, list[Buffer]]]:
        """See `EdgeSide.poll`."""
        ready = dict(self._poller.poll(milliseconds(timeout_s)))
        if self._waker.fileno() in ready:
            self._waker.drain()
        arrived: list[tuple[Channel, list[Buffer]]] = []
        for channel, connection in self._connections.items():  # CTL was opened first
            if connection.monitor in ready:
                self._events += connection.events()
            if connection.sock in ready:
                arrived += [(channel, frames) for frames in connection.receive()]
        for _, frames in arrived:
            self.traffic.received += wire_bytes(frames)
        self._knock()
        return arrived

    def send(self, channel: Channel, frames: Sequence[Buffer]) -> bool:
        """See `EdgeSide.send`."""
        if channel not in self._connections:
            self._open(channel)
        try:
            self._connections[channel].sock.send_multipart(frames, zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return False
        self.traffic.sent += wire_bytes(frames)
        return True

    def link_events(self) -> list[LinkEvent]:
        """See `EdgeSide.link_events`."""
        for connection in self._connections.values():
            self._events += connection.events()
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        """See `EdgeSide.wake`."""
        self._waker.wake()

    def reset(self) -> None:
        """See `EdgeSide.reset`."""
        self._hang_up()
        self._start()

    def use_key(self, hub_key: str) -> None:
        """See `EdgeSide.use_key`."""
        self._hub = replace(self._hub, key=hub_key)

    def close(self) -> None:
        """See `EdgeSide.close`."""
        self._stop_knocking()
        self._hang_up()
        self._waker.close()
        self._context.term()

    def _start(self) -> None:
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self._open(Channel.CTL)

    def _knock(self) -> None:
        """Look for the hub by other means while CTL's dial gets no answer; `Reachable` when it is there."""
        if not self._connections[Channel.CTL].dialling:
            self._dialling_since, self._knock_after_s = math.inf, _KNOCK_AFTER_S
            self._stop_knocking()
        elif self._knocker is None:
            now = time.monotonic()
            self._dialling_since = min(self._dialling_since, now)
            if now >= self._dialling_since + self._knock_after_s:
                self._knocker = Knocker(self._hub.host, self._hub.ctl, self.wake)
        elif self._knocker.accepted:
            # Should the dial that follows fail all the same, it is given its time.
            self._stop_knocking()
            self._dialling_since, self._knock_after_s = math.inf, _CONNECT_MS / 1000
            self._events.append(Reachable())

    def _stop_knocking(self) -> None:
        if self._knocker is not None:
            self._knocker.stop()
            self._knocker = None

    def _open(self, channel: Channel) -> None:
        connection = Connection(self._context, self._hub, self._keys, channel)
        self._connections[channel] = connection
        self._poller.register(connection.sock, zmq.POLLIN)
        self._poller.register(connection.monitor, zmq.POLLIN)

    def _hang_up(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()
        self._events.clear()
