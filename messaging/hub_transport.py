"""The hub's side of the link over ZeroMQ: one ROUTER socket per channel, CURVE on all of them."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Sequence
from typing import cast

import zmq

from messaging.access import EDGE_DOMAIN, ENROL_DOMAIN, Approval
from messaging.connections import can_count
from messaging.errors import InputError
from messaging.keys import KeyPair
from messaging.messages import MAX_FRAME_BYTES, MAX_TENSOR_BYTES
from messaging.sockets import PORTION, Context, Socket, Waker, milliseconds, readable, set_common_options
from messaging.transport import Allowance, Arrival, Buffer, Channel, Offence, Route, SendResult, Traffic, wire_bytes
from messaging.watch import Watch

_BACKLOG = 1024


class HubTransport:
    """Accepts edges; see `HubSide`. Owned by the thread that polls it; only `wake` is for others.

    Start a `Gatekeeper` on `context` first. `listen` is tcp://HOST:PORT; the channels take PORT, PORT + 1
    and PORT + 2, or three free ports for PORT 0. A message of more than `max_frames` frames is thrown away
    and arrives with no frames at all, so that its sender can be held to account. `approvals` gives the
    gatekeeper's, so that `look` can name who never said anything.
    """

    def __init__(
        self,
        context: Context,
        keys: KeyPair,
        listen: str,
        max_frames: int = 1 + MAX_TENSOR_BYTES // MAX_FRAME_BYTES,
        approvals: Callable[[], Iterable[Approval]] = tuple,
    ) -> None:
        host, port = _parse_listen(listen)
        self.traffic = Traffic()
        self._max_frames = max_frames
        self._waker = Waker()
        self._sockets: dict[Channel, Socket] = {}
        self._poller = zmq.Poller()
        self._poller.register(self._waker.fileno(), zmq.POLLIN)
        self.watches = can_count()
        for channel in Channel:
            self._sockets[channel] = context.socket(zmq.ROUTER)
        self._watch = Watch(context, self._sockets, approvals) if self.watches else None
        try:
            for channel in Channel:
                self._bind(keys, channel, f"tcp://{host}:{port + channel if port else 0}")
        except InputError:
            self.close()
            raise

    @property
    def endpoints(self) -> dict[Channel, str]:
        """The addresses that the channels are bound to."""
        return {channel: cast(bytes, sock.last_endpoint).decode() for channel, sock in self._sockets.items()}

    @property
    def ports(self) -> dict[Channel, int]:
        """The TCP ports that the channels are bound to."""
        return {channel: int(endpoint.rpartition(":")[2]) for channel, endpoint in self.endpoints.items()}

    def poll(self, timeout_s: float) -> list[Arrival]:
        """See `HubSide.poll`."""
        ready = dict(self._poller.poll(milliseconds(timeout_s)))
        if self._waker.fileno() in ready:
            self._waker.drain()
        arrivals: list[Arrival] = []
        for channel, sock in self._sockets.items():  # CTL was bound first
            if sock in ready:
                arrivals += self._receive(channel, sock)
        return arrivals

    def rest(self, seconds: float) -> None:
        """See `HubSide.rest`."""
        if seconds:
            self._waker.wait(seconds)

    def send(self, route: Route, frames: Sequence[Buffer]) -> SendResult:
        """See `HubSide.send`."""
        try:
            self._sockets[route.channel].send_multipart([route.routing_id, *frames], zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno != errno.EHOSTUNREACH:
                raise
            return SendResult.GONE
        size = wire_bytes(frames)
        self.traffic.sent += size
        if self._watch is not None:
            self._watch.sent(route, size)
        return SendResult.SENT

    def unread(self, route: Route, most: int) -> int:
        """See `HubSide.unread`."""
        return self._watch.unread(route, most) if self._watch is not None else 0

    def cut(self, route: Route) -> str | None:
        """See `HubSide.cut`."""
        return self._watch.cut(route) if self._watch is not None else None

    def look(self, allowance: Allowance) -> list[Offence]:
        """See `HubSide.look`."""
        return self._watch.look(allowance) if self._watch is not None else []

    def wake(self) -> None:
        """See `HubSide.wake`."""
        self._waker.wake()

    def close(self) -> None:
        """See `HubSide.close`."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        for sock in self._sockets.values():
            sock.close()
        self._waker.close()

    def _bind(self, keys: KeyPair, channel: Channel, endpoint: str) -> None:
        sock = self._sockets[channel]
        set_common_options(sock, channel)
        sock.setsockopt(zmq.IPV6, int("[" in endpoint))
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sock.setsockopt(zmq.ROUTER_HANDOVER, 0)
        sock.setsockopt(zmq.BACKLOG, _BACKLOG)
        sock.setsockopt(zmq.CURVE_SERVER, 1)
        sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        domain = ENROL_DOMAIN if channel is Channel.ENROL else EDGE_DOMAIN
        sock.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        try:
            sock.bind(endpoint)
        except zmq.ZMQError as error:
            raise InputError(f"cannot listen on {endpoint}: {error.strerror}; choose another with --listen") from error
        self._poller.register(sock, zmq.POLLIN)

    def _receive(self, channel: Channel, sock: Socket) -> list[Arrival]:
        """A portion of what waits in a socket that has something."""
        arrivals = [self._receive_one(channel, sock)]
        while len(arrivals) < PORTION[channel] and readable(sock):
            arrivals.append(self._receive_one(channel, sock))
        return arrivals

    def _receive_one(self, channel: Channel, sock: Socket) -> Arrival:
        """One message. Its tensor frames stay where libzmq put them; the header is copied."""
        first = sock.recv(copy=False)
        routing_id = first.bytes
        frames: list[Buffer] = []
        count = size = 0
        more = first.more
        while more:
            frame = sock.recv(copy=False)
            more = frame.more
            count += 1
            size += wire_bytes((frame.buffer,))
            if count <= self._max_frames:
                frames.append(frame.buffer if frames else frame.bytes)
        self.traffic.received += size
        if self._watch is not None:
            self._watch.delivered(channel, routing_id, first, size)
        if count > self._max_frames:
            self.traffic.dropped += 1
            frames = []
        return Arrival(str(first["User-Id"]), Route(channel, routing_id, str(first["Peer-Address"])), frames)


def _parse_listen(listen: str) -> tuple[str, int]:
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^:\[\]/]+):(\d{1,5})", listen)
    if match is None or int(match[2]) > 65533:
        raise InputError(f"cannot listen on {listen!r}: give tcp://HOST:PORT, PORT 0 for free ones")
    return match[1], int(match[2])
