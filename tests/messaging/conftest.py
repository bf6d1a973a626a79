"""A hub on loopback with real sockets, and edges that connect to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from messaging.access import Gatekeeper
from messaging.edge_transport import EdgeTransport
from messaging.hub_transport import HubTransport
from messaging.joining import HubAddress
from messaging.keys import KeyPair, new_keys
from messaging.sockets import Context
from messaging.transport import Arrival, Channel, Connected, ConnectFailed, LinkEvent


class Names:
    """An allow-list in a dict, which can be told to fail."""

    def __init__(self) -> None:
        self.enrolled: dict[str, str] = {}
        self.broken = False

    def name_of(self, key: str) -> str | None:
        if self.broken:
            raise OSError("the disk is gone")
        return self.enrolled.get(key)


class LoopbackHub:
    """Gatekeeper and transport on free ports, polled by the test itself."""

    def __init__(self, max_frames: int = 64) -> None:
        self.keys = new_keys()
        self.names = Names()
        self.context: Context = zmq.Context()
        self.gatekeeper = Gatekeeper(self.context, self.names)
        self.transport = HubTransport(
            self.context, self.keys, "tcp://127.0.0.1:0", max_frames, self.gatekeeper.approvals
        )
        self.edges: list[EdgeTransport] = []
        self.waiting: list[Arrival] = []

    @property
    def address(self) -> HubAddress:
        ports = self.transport.ports
        return HubAddress("127.0.0.1", ports[Channel.CTL], ports[Channel.BULK], ports[Channel.ENROL], self.keys.public)

    def enrolled(self, name: str = "ward 3") -> KeyPair:
        keys = new_keys()
        self.names.enrolled[keys.public] = name
        return keys

    def edge(self, keys: KeyPair, address: HubAddress | None = None) -> EdgeTransport:
        edge = EdgeTransport(address or self.address, keys)
        self.edges.append(edge)
        return edge

    def arrival(self) -> Arrival:
        """The next message, which must come within 30 s."""
        deadline = time.monotonic() + 30
        while not self.waiting:
            assert time.monotonic() < deadline, "nothing arrived at the hub"
            self.waiting += self.transport.poll(0.1)
        return self.waiting.pop(0)

    def close(self) -> None:
        for edge in self.edges:
            edge.close()
        self.transport.close()
        self.gatekeeper.stop()
        self.context.term()


@pytest.fixture
def make_hub() -> Iterator[Callable[..., LoopbackHub]]:
    hubs: list[LoopbackHub] = []

    def make(max_frames: int = 64) -> LoopbackHub:
        hubs.append(LoopbackHub(max_frames))
        return hubs[-1]

    yield make
    for hub in hubs:
        hub.close()


@pytest.fixture
def hub(make_hub: Callable[..., LoopbackHub]) -> LoopbackHub:
    return make_hub()


@pytest.fixture
def first_event() -> Callable[[EdgeTransport], LinkEvent]:
    """Waits up to 30 s for an edge's first Connected or ConnectFailed."""

    def wait(edge: EdgeTransport) -> LinkEvent:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            edge.poll(0.1)
            for event in edge.link_events():
                if isinstance(event, Connected | ConnectFailed):
                    return event
        raise AssertionError("nothing happened to the connection")

    return wait
