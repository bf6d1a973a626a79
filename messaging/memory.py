"""A transport inside one process, for tests of everything above the wire. No sockets, no encryption.

    hub = MemoryHub()
    edge = hub.connect("the edge's key")

Its links never fill up and lose nothing, unless they are cut: `hub.cut_off(key)`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

from messaging.transport import (
    Allowance,
    Arrival,
    Buffer,
    Channel,
    Connected,
    Disconnected,
    LinkEvent,
    Offence,
    Route,
    SendResult,
    Traffic,
    wire_bytes,
)

T = TypeVar("T")


class _Inbox(Generic[T]):
    """What waits for one side, and its alarm clock."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._woken = False
        self._changed = threading.Condition()

    def put(self, item: T) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def take(self, timeout_s: float) -> list[T]:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._woken, timeout_s)
            self._woken = False
            items = list(self._items)
            self._items.clear()
            return items

    def rest(self, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._woken, timeout_s)

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()


def _frozen(frames: Sequence[Buffer]) -> list[Buffer]:
    """Copies, as a wire makes them: what the sender does with its buffers afterwards changes nothing."""
    return [bytes(frame) for frame in frames]


class MemoryHub:
    """The hub's side; see `HubSide`."""

    watches = False

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._inbox: _Inbox[Arrival] = _Inbox()
        self._edges: dict[bytes, MemoryEdge] = {}
        self._connections = 0

    def connect(self, key: str) -> MemoryEdge:
        """A new edge that the hub sees under this key."""
        return MemoryEdge(self, key)

    def cut(self, route: Route) -> str | None:
        edge = self._edges.get(route.routing_id)
        if edge is None:
            return None
        edge.redial()
        return edge.key

    def cut_off(self, key: str) -> None:
        """End the connections of `key` as a broken link does: old routes are gone, new ones are there."""
        for edge in {edge for edge in self._edges.values() if edge.key == key}:
            edge.redial()

    def poll(self, timeout_s: float) -> list[Arrival]:
        arrivals = sorted(self._inbox.take(timeout_s), key=lambda arrival: arrival.route.channel)
        for arrival in arrivals:
            self.traffic.received += wire_bytes(arrival.frames)
        return arrivals

    def rest(self, seconds: float) -> None:
        self._inbox.rest(seconds)

    def send(self, route: Route, frames: Sequence[Buffer]) -> SendResult:
        edge = self._edges.get(route.routing_id)
        if edge is None:
            return SendResult.GONE
        self.traffic.sent += wire_bytes(frames)
        edge.inbox.put((route.channel, _frozen(frames)))
        return SendResult.SENT

    def unread(self, route: Route, most: int) -> int:
        return 0

    def look(self, allowance: Allowance) -> list[Offence]:
        return []

    def wake(self) -> None:
        self._inbox.wake()

    def close(self) -> None:
        self._edges.clear()

    def register(self, edge: MemoryEdge) -> bytes:
        """A routing id for a new connection of `edge`."""
        self._connections += 1
        routing_id = self._connections.to_bytes(5, "big")
        self._edges[routing_id] = edge
        return routing_id

    def forget(self, routing_id: bytes) -> None:
        """That connection is gone."""
        self._edges.pop(routing_id, None)

    def accept(self, arrival: Arrival) -> bool:
        """Take what an edge sends; False when its connection is gone."""
        if arrival.route.routing_id not in self._edges:
            return False
        self._inbox.put(arrival)
        return True


class MemoryEdge:
    """An edge's side; see `EdgeSide`. Made by `MemoryHub.connect`."""

    def __init__(self, hub: MemoryHub, key: str) -> None:
        self.key = key
        self.traffic = Traffic()
        self.inbox: _Inbox[tuple[Channel, list[Buffer]]] = _Inbox()
        self._hub = hub
        self._events: deque[LinkEvent] = deque()
        self._routes: dict[Channel, bytes] = {}
        self._open(Channel.CTL)

    def poll(self, timeout_s: float) -> list[tuple[Channel, list[Buffer]]]:
        items = sorted(self.inbox.take(timeout_s), key=lambda item: item[0])
        for _, frames in items:
            self.traffic.received += wire_bytes(frames)
        return items

    def send(self, channel: Channel, frames: Sequence[Buffer]) -> bool:
        if channel not in self._routes:
            self._open(channel)
        route = Route(channel, self._routes[channel])
        if not self._hub.accept(Arrival(self.key, route, _frozen(frames))):
            return False
        self.traffic.sent += wire_bytes(frames)
        return True

    def link_events(self) -> list[LinkEvent]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def wake(self) -> None:
        self.inbox.wake()

    def redial(self) -> None:
        """Lose every connection and get new ones, as after a broken link."""
        for channel, routing_id in list(self._routes.items()):
            self._hub.forget(routing_id)
            self._events.append(Disconnected(channel))
            self._open(channel)

    def use_key(self, hub_key: str) -> None:
        """Nothing is encrypted in here."""

    def reset(self) -> None:
        self.close()
        self._open(Channel.CTL)

    def close(self) -> None:
        for routing_id in self._routes.values():
            self._hub.forget(routing_id)
        self._routes.clear()

    def _open(self, channel: Channel) -> None:
        self._routes[channel] = self._hub.register(self)
        self._events.append(Connected(channel))
        self.inbox.wake()
