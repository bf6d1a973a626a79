"""The connections behind a ROUTER socket, and what the kernel knows of them.

libzmq tells neither who is connected nor how much of an unfinished message it holds. The kernel does: it
counts the bytes that a connection received and those that its peer acknowledged. Held against what the
application took and sent, that gives the bytes which lie in between.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import zmq

from messaging.sockets import Context, Socket, readable
from messaging.transport import Channel

_EVENT = struct.Struct("=HI")
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
#: tcpi_bytes_acked and tcpi_bytes_received, and where they stand in Linux's struct tcp_info (since 4.1)
_BYTES = struct.Struct("=QQ")
_BYTES_AT = 120
_INFO_BYTES = _BYTES_AT + _BYTES.size
_COOKIE = struct.Struct("=Q")
#: Linux's number of the option that gives a socket's unique id; Python has no name for it.
_SO_COOKIE = 57


@dataclass(frozen=True, slots=True)
class Counters:
    """What the kernel says of one connection: a number that no other socket has, and bytes since its start."""

    cookie: int
    received: int
    acked: int


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted connection. `fd` is libzmq's; it may be closed at any moment, and given to another."""

    channel: Channel
    fd: int
    opened_at: float
    #: proved by CURVE; None as long as no message came
    key: str | None = None
    routing_id: bytes = b""
    cookie: int = 0
    #: bytes on the wire of the messages that the application took and sent
    delivered: int = 0
    sent: int = 0
    #: the kernel's counters when they were last read
    received: int = 0
    acked: int = 0
    #: bytes that the peer acknowledged and that were no message's: handshake and heartbeats
    overhead: int = 0

    @property
    def unread(self) -> int:
        """Bytes sent that the peer had not acknowledged when the counters were last read."""
        return self.sent - (self.acked - self.overhead)

    def read(self) -> bool:
        """Bring the kernel's counters up to date. False if the connection is gone."""
        with _Borrowed(self.fd) as borrowed:
            found = borrowed.counters()
        if found is None or self.cookie not in (0, found.cookie):
            return False
        self.cookie, self.received, self.acked = found.cookie, found.received, found.acked
        self.overhead = max(self.overhead, found.acked - self.sent)
        return True

    def peer(self) -> str:
        """The address of the machine at the other end; empty if the connection is gone."""
        with _Borrowed(self.fd) as borrowed:
            return borrowed.address(self.cookie)

    def cut(self) -> bool:
        """End it. libzmq then drops what it holds of it. False if it is gone already."""
        with _Borrowed(self.fd) as borrowed:
            return borrowed.shut(self.cookie)


class _Borrowed:
    """A descriptor of somebody else's socket, as one of our own for a moment, so that it stays the same socket."""

    def __init__(self, fd: int) -> None:
        self._sock: socket.socket | None = None
        try:
            copy = os.dup(fd)
        except OSError:
            return
        try:
            # With a family given Python does not ask the kernel for it; none of the calls below needs it.
            self._sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=copy)
        except OSError:
            os.close(copy)

    def __enter__(self) -> _Borrowed:
        return self

    def __exit__(self, *_: object) -> None:
        if self._sock is not None:
            self._sock.close()

    def counters(self) -> Counters | None:
        """None if this is no TCP connection (any more)."""
        if self._sock is None:
            return None
        try:
            info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
            cookie = self._cookie()
        except OSError:
            return None
        if len(info) < _INFO_BYTES:
            return None
        acked, received = _BYTES.unpack_from(info, _BYTES_AT)
        return Counters(cookie, received, acked)

    def address(self, cookie: int) -> str:
        try:
            return str(self._sock.getpeername()[0]) if self._sock and self._cookie() == cookie else ""
        except OSError:
            return ""

    def shut(self, cookie: int) -> bool:
        try:
            if self._sock is None or self._cookie() != cookie:
                return False
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True

    def _cookie(self) -> int:
        assert self._sock is not None
        return int(_COOKIE.unpack(self._sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, _COOKIE.size))[0])


class Connections:
    """All connections of one ROUTER socket, from what its monitor tells. Make it before the socket is bound."""

    def __init__(self, context: Context, sock: Socket, channel: Channel) -> None:
        self._channel = channel
        self._sock = sock
        address = f"inproc://connections-{channel.name}-{id(self):x}"
        sock.monitor(address, _EVENTS)
        self._monitor: Socket = context.socket(zmq.PAIR)
        # Without a limit: a full monitor would stop libzmq's I/O thread.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.setsockopt(zmq.LINGER, 0)
        self._monitor.connect(address)
        self._by_fd: dict[int, Connection] = {}
        self._by_route: dict[bytes, Connection] = {}

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._by_fd.values()))

    def __len__(self) -> int:
        return len(self._by_fd)

    def refresh(self, now: float) -> None:
        """Learn who came and went. `now` is noted as the time of those who came."""
        while readable(self._monitor):
            event, *_ = self._monitor.recv_multipart()
            kind, fd = _EVENT.unpack(event)
            gone = self._by_fd.pop(fd, None)
            if gone is not None:
                self._by_route.pop(gone.routing_id, None)
            if kind == zmq.EVENT_ACCEPTED:
                self._by_fd[fd] = Connection(self._channel, fd, now)

    def of(self, routing_id: bytes) -> Connection | None:
        """The connection that messages with this routing id come from."""
        return self._by_route.get(routing_id)

    def bind(self, routing_id: bytes, fd: int, key: str, now: float) -> Connection | None:
        """The first message with this routing id came from `fd`, sent by `key`. None if that is gone already."""
        self.refresh(now)
        found = self._by_fd.get(fd)
        if found is None:
            return None
        if not found.routing_id:
            found.routing_id, found.key = routing_id, key
            self._by_route[routing_id] = found
        return found

    def close(self) -> None:
        """Give the monitor back; before its socket is closed."""
        self._sock.disable_monitor()
        self._monitor.close()


def can_count() -> bool:
    """Whether this system tells what `Connection.read` asks for."""
    if not sys.platform.startswith("linux"):
        return False
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]) as near:
        far, _ = server.accept()
        with far, _Borrowed(far.fileno()) as borrowed:
            near.sendall(bytes(100))
            far.recv(100, socket.MSG_WAITALL)
            found = borrowed.counters()
    return found is not None and found.received == 100
