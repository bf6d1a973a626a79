"""What the hub's and the edge's sockets have in common: options, limits and the alarm clock for pollers."""

from __future__ import annotations

import contextlib
import math
import select
import socket
from typing import cast

import zmq

from messaging.messages import MAX_FRAME_BYTES
from messaging.transport import CURVE_BYTES, Channel

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

#: The largest frame on the wire, per channel: enrolment is open to every key, so it takes small ones only.
MAX_WIRE_FRAME = {
    Channel.CTL: MAX_FRAME_BYTES + CURVE_BYTES,
    Channel.BULK: MAX_FRAME_BYTES + CURVE_BYTES,
    Channel.ENROL: 1024 + CURVE_BYTES,
}
#: Messages that wait in a socket to be sent, per peer. Below about 5 a ROUTER drops replies.
HIGH_WATER = {Channel.CTL: 64, Channel.BULK: 16, Channel.ENROL: 8}

#: Messages that one poll takes from each channel: ctl first, but bulk gets its turn.
PORTION = {Channel.CTL: 256, Channel.BULK: 16, Channel.ENROL: 8}

#: A plain number: arithmetic with an enum takes ten times as long.
_POLLIN = int(zmq.POLLIN)

_HEARTBEAT_MS = 5_000
#: Heartbeats find a silent link where there are any, TCP_MAXRT one with unsent data.
_DEAD_LINK_MS = 15_000
#: On CTL the kernel asks after a link that was silent for so long, and again. On Linux TCP_MAXRT says when there was
#: no answer for too long; elsewhere the number of questions does.
_KEEPALIVE_S, _KEEPALIVE_AGAIN_S, _KEEPALIVE_TIMES = 10, 5, 2
_HANDSHAKE_MS = 5_000


def set_common_options(sock: Socket, channel: Channel) -> None:
    """Limits, liveness and closing, alike on both sides.

    On CTL there are no ZeroMQ heartbeats: an edge's pings find all that they would, the kernel ends connections whose
    other end is gone, and the heartbeats of a thousand idle edges cost the hub as much as their pings.
    """
    sock.setsockopt(zmq.MAXMSGSIZE, MAX_WIRE_FRAME[channel])
    sock.setsockopt(zmq.SNDHWM, HIGH_WATER[channel])
    # No limit here: where one stops the input, and the peer then goes away before a heartbeat is due, libzmq 4.3.5
    # aborts the whole process (an assertion on _io_error). Credits bound what arrives, and `watch.py` at the hub.
    sock.setsockopt(zmq.RCVHWM, 0)
    if channel is Channel.CTL:
        sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
        sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_AGAIN_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_TIMES)
    else:
        sock.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_LINK_MS)
    sock.setsockopt(zmq.TCP_MAXRT, _DEAD_LINK_MS)
    sock.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
    sock.setsockopt(zmq.LINGER, 0)


def readable(sock: Socket) -> bool:
    """Whether a message waits. Three times cheaper than a receive that fails."""
    return bool(cast(int, sock.getsockopt(zmq.EVENTS)) & _POLLIN)


def milliseconds(seconds: float) -> int:
    """A time to wait as a poller wants it: rounded up, so that a short wait is none of zero; an hour at most."""
    return math.ceil(min(max(seconds, 0.0), 3600.0) * 1000)


class Waker:
    """Ends a poll from another thread: register `fileno()` in the poller, and `drain` when it is readable."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)
        self._poll = select.poll()
        self._poll.register(self._near, select.POLLIN)

    def fileno(self) -> int:
        """The descriptor that becomes readable."""
        return self._near.fileno()

    def wake(self) -> None:
        """For any thread, at any time. A full buffer means that a wake is pending; a closed one, that nobody waits."""
        with contextlib.suppress(OSError):
            self._far.send(b"\0")

    def wait(self, seconds: float) -> None:
        """Until there is a wake that was not drained, or for so long."""
        self._poll.poll(milliseconds(seconds))

    def drain(self) -> None:
        """Forget the wakes so far."""
        with contextlib.suppress(BlockingIOError):
            while len(self._near.recv(4096)) == 4096:
                pass

    def close(self) -> None:
        """Give the descriptors back."""
        self._near.close()
        self._far.close()
