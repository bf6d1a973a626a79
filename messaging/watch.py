"""Cuts off who would fill the hub's memory: a peer that sends a message without an end, or never reads.

Neither libzmq's high-water marks nor its limit on frames bound a message of many frames, since only whole
messages count. What lies undelivered is what the kernel has received less what the application took.
"""

from __future__ import annotations

import ctypes
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import zmq

from messaging.access import Approval
from messaging.connections import Connection, Connections
from messaging.sockets import Context, Socket
from messaging.transport import Allowance, Channel, Offence, Route

#: A full look is taken when the process has grown by this much, or every so many seconds, or more seldom with
#: many connections.
_GROWTH_BYTES = 8 << 20
_CONNECTIONS_PER_S = 100
#: Of the time, the part that may go into looking.
_EFFORT = 0.1
#: What a connection may hold undelivered besides requests: what lies in the kernel's buffers, and frames' heads.
_SLACK_BYTES = 8 << 20
#: The most that may lie undelivered, besides that, where messages are small.
_SMALL = {Channel.CTL: 64 << 20, Channel.ENROL: 0}
#: Heartbeats, which are received and never delivered, in bytes a second; on CTL there are none.
_CHATTER = 64
#: A handshake is over so many seconds after the connection was accepted.
_HANDSHAKE_S = 6.0
#: Handshakes of one key that are remembered without knowing their connections.
_MOST_APPROVALS = 64
_TRIM_BYTES = 32 << 20
#: libzmq's thread drops what it held of a connection that was cut when it gets its turn, which nobody is told of:
#: after a cut, memory is given back after the first of these, and again after twice as long up to the last.
_TRIM_FIRST_S, _TRIM_LAST_S = 1.0, 16.0
#: Opening it takes five times as long as reading it.
_STATM, _STATM_BYTES = "/proc/self/statm", 128


class Watch:
    """Counts per connection, and cuts. Belongs to the thread that owns the sockets."""

    def __init__(
        self,
        context: Context,
        sockets: Mapping[Channel, Socket],
        approvals: Callable[[], Iterable[Approval]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channels = {channel: Connections(context, sock, channel) for channel, sock in sockets.items()}
        self._approvals = Approvals(approvals)
        self._clock = clock
        self._statm = os.open(_STATM, os.O_RDONLY)
        self._seen_rss = resident_bytes(self._statm)
        self._look_at = -1.0
        self._not_before = -1.0
        self._trims = Trims()

    def delivered(self, channel: Channel, routing_id: bytes, first: zmq.Frame, size: int) -> None:
        """The application took a message of `size` bytes on the wire; `first` is its routing id's frame."""
        connection = self._channels[channel].of(routing_id)
        if connection is None:
            fd, key = int(first["__fd"]), str(first["User-Id"])
            connection = self._channels[channel].bind(routing_id, fd, key, self._clock())
            if connection is None:
                return
            self._approvals.identified(connection)
        connection.delivered += size

    def sent(self, route: Route, size: int) -> None:
        """A message of `size` bytes on the wire was given to libzmq."""
        connection = self._channels[route.channel].of(route.routing_id)
        if connection is not None:
            connection.sent += size

    def unread(self, route: Route, most: int) -> int:
        """Bytes sent that the peer has not acknowledged. Exact if above `most`, else maybe less."""
        connection = self._channels[route.channel].of(route.routing_id)
        if connection is None:
            return 0
        if connection.unread > most and not connection.read():
            return 0
        return connection.unread

    def cut(self, route: Route) -> str | None:
        """End a connection; the key that it belonged to."""
        connection = self._channels[route.channel].of(route.routing_id)
        if connection is None or not connection.read():
            return None
        connection.cut()
        return connection.key

    def look(self, allowance: Allowance) -> list[Offence]:
        """Cut who has more undelivered than allowed; what was cut. Does little when the process has not grown."""
        now = self._clock()
        for connections in self._channels.values():
            connections.refresh(now)
        if self._trims.due(now):
            _give_back()
        rss = resident_bytes(self._statm)
        if now < self._not_before or (now < self._look_at and rss < self._seen_rss + _GROWTH_BYTES):
            self._seen_rss = min(self._seen_rss, rss)
            return []
        everybody = [connection for connections in self._channels.values() for connection in connections]
        undelivered = {connection: _undelivered(connection, now) for connection in everybody}
        condemned = condemn(undelivered, allowance)
        offences = [self._cut(connection, undelivered[connection], endless) for connection, endless in condemned]
        if sum(offence.size for offence in offences) > _TRIM_BYTES:
            self._trims.cut(now)
        took = self._clock() - now
        self._seen_rss = rss
        self._not_before = now + took / _EFFORT
        self._look_at = now + max(1.0, len(everybody) / _CONNECTIONS_PER_S)
        return offences

    def close(self) -> None:
        """Give the monitors back; before the sockets are closed."""
        os.close(self._statm)
        for connections in self._channels.values():
            connections.close()

    def _cut(self, connection: Connection, size: int, endless: bool) -> Offence:
        address = connection.peer()
        connection.cut()
        # The next look must not find it again, before libzmq has said that it is gone.
        connection.delivered += size
        key = connection.key or self._approvals.guess(connection, address)
        return Offence(connection.channel, key, address, size, endless)


class Approvals:
    """Which keys passed a handshake, so that a connection that never said anything may be named all the same.

    Exact where only one key comes into question; otherwise no name is given.
    """

    def __init__(self, source: Callable[[], Iterable[Approval]]) -> None:
        self._source = source
        self._open: defaultdict[str, list[Approval]] = defaultdict(list)

    def identified(self, connection: Connection) -> None:
        """This connection's key is known: one of that key's approvals was its."""
        self._collect()
        mine = self._open.get(connection.key or "", [])
        if mine:
            mine.remove(min(mine, key=lambda approval: abs(approval.at - connection.opened_at)))
            if not mine:
                del self._open[connection.key or ""]

    def guess(self, connection: Connection, address: str) -> str | None:
        """The only key whose handshake can have been this connection's."""
        self._collect()
        begin, end = connection.opened_at - 1.0, connection.opened_at + _HANDSHAKE_S
        keys = {
            approval.key
            for approvals in self._open.values()
            for approval in approvals
            if approval.address == address and begin <= approval.at <= end
        }
        return keys.pop() if len(keys) == 1 and connection.channel is not Channel.ENROL else None

    def _collect(self) -> None:
        for approval in self._source():
            mine = self._open[approval.key]
            mine.append(approval)
            del mine[:-_MOST_APPROVALS]


class Trims:
    """When to give memory back after cuts: soon, since it may be much, and again, since not all may be free by then."""

    def __init__(self) -> None:
        self._cut_at, self._at = -math.inf, math.inf

    def cut(self, now: float) -> None:
        """A connection was cut that had much undelivered."""
        self._cut_at = now
        self._at = min(self._at, now + _TRIM_FIRST_S)

    def due(self, now: float) -> bool:
        """Whether to do so at this moment; if so, the next time is set."""
        if now < self._at:
            return False
        since = max(now - self._cut_at, _TRIM_FIRST_S)
        self._at = now + since if since < _TRIM_LAST_S else math.inf
        return True


def condemn(undelivered: Mapping[Connection, int], allowance: Allowance) -> list[tuple[Connection, bool]]:
    """Whom to cut: (connection, whether it sent more than any message may have).

    If what is left is too much for all, the greatest goes, until it is not.
    """
    condemned: list[tuple[Connection, bool]] = []
    rest = 0
    within: list[Connection] = []
    for connection, size in undelivered.items():
        if size > _SMALL.get(connection.channel, allowance.one) + _SLACK_BYTES:
            condemned.append((connection, True))
        elif size > _SLACK_BYTES:
            within.append(connection)
            rest += size
    if rest > allowance.all + _SLACK_BYTES:
        for connection in sorted(within, key=lambda item: undelivered[item], reverse=True):
            condemned.append((connection, False))
            rest -= undelivered[connection]
            if rest <= allowance.all:
                break
    return condemned


def resident_bytes(statm: int) -> int:
    """Memory that the process has in RAM whose /proc/PID/statm is open as the descriptor `statm`."""
    return int(os.pread(statm, _STATM_BYTES, 0).split()[1]) * resource.getpagesize()


def _undelivered(connection: Connection, now: float) -> int:
    if not connection.read():
        return 0
    chatter = 0 if connection.channel is Channel.CTL else round(_CHATTER * (now - connection.opened_at))
    return connection.received - connection.delivered - chatter


def _give_back() -> None:
    """Have the C library return freed memory, which it may keep after many small frames."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
