"""The in-memory transport behaves as the real one does, as far as the code above can see."""

from __future__ import annotations

import threading
import time

from messaging.memory import MemoryHub
from messaging.transport import (
    Channel,
    Connected,
    Disconnected,
    EdgeSide,
    HubSide,
    Route,
    SendResult,
    wire_bytes,
)


def test_several_edges_there_and_back() -> None:
    memory = MemoryHub()
    hub: HubSide = memory
    edges: dict[str, EdgeSide] = {key: memory.connect(key) for key in ("a", "b")}
    for key, edge in edges.items():
        assert edge.link_events() == [Connected(Channel.CTL)]
        assert edge.send(Channel.BULK, [b"bulk", key.encode()])
        assert edge.send(Channel.CTL, [b"ctl", key.encode()])
    arrivals = hub.poll(1)
    assert [(item.key, item.route.channel) for item in arrivals] == [
        *(("a", Channel.CTL), ("b", Channel.CTL)),
        *(("a", Channel.BULK), ("b", Channel.BULK)),
    ]
    for arrival in arrivals:
        assert hub.send(arrival.route, arrival.frames) is SendResult.SENT
    for key, edge in edges.items():
        received = edge.poll(1)
        assert received == [(Channel.CTL, [b"ctl", key.encode()]), (Channel.BULK, [b"bulk", key.encode()])]
        assert edge.traffic.sent == edge.traffic.received == sum(wire_bytes(frames) for _, frames in received)


def test_frames_are_copied() -> None:
    hub = MemoryHub()
    data = bytearray(b"before")
    hub.connect("a").send(Channel.CTL, [memoryview(data)])
    data[:] = b"after!"
    assert hub.poll(0)[0].frames == [b"before"]


def test_cut_and_reset() -> None:
    hub = MemoryHub()
    edge = hub.connect("a")
    edge.send(Channel.CTL, [b"x"])
    old = hub.poll(0)[0].route
    edge.link_events()
    hub.cut_off("a")
    assert edge.link_events() == [Disconnected(Channel.CTL), Connected(Channel.CTL)]
    assert hub.send(old, [b"late"]) is SendResult.GONE
    assert edge.send(Channel.CTL, [b"y"])
    new = hub.poll(0)[0].route
    edge.reset()
    assert edge.link_events() == [Connected(Channel.CTL)]
    assert hub.send(new, [b"late"]) is SendResult.GONE
    assert hub.send(Route(Channel.CTL, b"none"), [b"x"]) is SendResult.GONE
    hub.close()
    assert not edge.send(Channel.CTL, [b"z"])
    edge.close()


def test_waiting_and_waking() -> None:
    hub = MemoryHub()
    edge = hub.connect("a")
    edge.poll(0)  # the news of its connection
    for side in (hub, edge):
        began = time.monotonic()
        assert side.poll(0.05) == []
        assert time.monotonic() - began > 0.04
        threading.Timer(0.05, side.wake).start()
        assert side.poll(5) == []
        assert time.monotonic() - began < 4
