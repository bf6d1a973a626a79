"""The ZeroMQ transports on loopback: sending, limits, waking, fresh sockets, counting."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import pytest
import zmq

from messaging.edge_transport import EdgeTransport
from messaging.errors import InputError
from messaging.hub_transport import HubTransport
from messaging.messages import MAX_FRAME_BYTES
from messaging.sockets import readable
from messaging.transport import Buffer, Channel, Connected, Disconnected, LinkEvent, Route, SendResult, wire_bytes

FirstEvent = Callable[[EdgeTransport], LinkEvent]


def joined(hub, first_event: FirstEvent) -> EdgeTransport:
    edge = hub.edge(hub.enrolled())
    assert first_event(edge) == Connected(Channel.CTL)
    return edge


def send(edge: EdgeTransport, channel: Channel, frames: list[Buffer]) -> None:
    """Send as soon as the channel takes it."""
    deadline = time.monotonic() + 30
    while not edge.send(channel, frames):
        assert time.monotonic() < deadline
        edge.poll(0.1)
        edge.link_events()


def receive(edge: EdgeTransport) -> tuple[Channel, list[Buffer]]:
    """The next message, which must come within 30 s."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if arrived := edge.poll(0.1):
            assert len(arrived) == 1
            return arrived[0]
    raise AssertionError("nothing arrived at the edge")


def test_there_and_back_on_both_channels(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    for channel, data in ((Channel.CTL, b"small"), (Channel.BULK, bytes(MAX_FRAME_BYTES))):
        send(edge, channel, [b"head", data, data])
        arrival = hub.arrival()
        assert arrival.route.channel is channel
        assert isinstance(arrival.frames[0], bytes)
        assert arrival.frames == [b"head", data, data]
        assert hub.transport.send(arrival.route, arrival.frames) is SendResult.SENT
        assert receive(edge) == (channel, [b"head", data, data])


def kept_alive(fd: int) -> tuple[int, int, int, int]:
    """SO_KEEPALIVE, and seconds until the kernel asks, between two questions, and how many, of somebody's socket."""
    with socket.socket(fileno=os.dup(fd)) as sock:
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        times = [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        return (sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *times)  # type: ignore[return-value]


@pytest.mark.skipif(sys.platform != "linux", reason="counts on /proc")
def test_ctl_is_kept_alive_by_the_kernel_on_both_sides_and_bulk_by_heartbeats(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    for channel in (Channel.BULK, Channel.CTL):
        send(edge, channel, [b"x"])
        hub.arrival()
    (accepted,) = hub.transport._watch._channels[Channel.CTL]
    assert kept_alive(accepted.fd) == (1, 10, 5, 2)
    # The hub and this edge are one process: the other end is the socket whose peer is the hub's port.
    sides = [kept_alive(fd) for fd in descriptors_to(hub.transport.ports[Channel.CTL])]
    assert sides == [(1, 10, 5, 2)]
    for channel, heartbeat in ((Channel.CTL, 0), (Channel.BULK, 5000)):
        assert hub.transport._sockets[channel].getsockopt(zmq.HEARTBEAT_IVL) == heartbeat
        assert edge._connections[channel].sock.getsockopt(zmq.HEARTBEAT_IVL) == heartbeat


def descriptors_to(port: int) -> list[int]:
    """This process's TCP sockets that dialled a port."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as sock:
                if sock.getpeername()[1] == port:
                    found.append(int(name))
        except (OSError, IndexError, TypeError):
            continue
    return found


def test_bulk_is_opened_by_the_first_send(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    assert not edge.send(Channel.BULK, [b"x"])
    assert first_event(edge) == Connected(Channel.BULK)
    assert edge.send(Channel.BULK, [b"x"])
    assert hub.arrival().frames == [b"x"]


def test_ctl_comes_first(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    for _ in range(3):
        send(edge, Channel.BULK, [b"bulk"])
    send(edge, Channel.CTL, [b"ctl"])
    deadline = time.monotonic() + 30
    while not all(readable(hub.transport._sockets[channel]) for channel in (Channel.CTL, Channel.BULK)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first, *others = [arrival.frames[0] for arrival in hub.transport.poll(1)]
    while len(others) < 3:
        others += [hub.arrival().frames[0]]
    assert (first, others) == (b"ctl", [b"bulk"] * 3)


def test_one_poll_is_bounded(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    for _ in range(24):
        send(edge, Channel.BULK, [b"bulk"])
    time.sleep(0.1)
    portions = []
    while sum(portions) < 24:
        portions.append(len(hub.transport.poll(1)))
    assert max(portions) <= 16


def test_a_route_dies_with_its_connection(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    send(edge, Channel.CTL, [b"hello"])
    route = hub.arrival().route
    edge.reset()
    assert first_event(edge) == Connected(Channel.CTL)
    deadline = time.monotonic() + 30
    while hub.transport.send(route, [b"late"]) is not SendResult.GONE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert hub.transport.send(Route(Channel.BULK, b"nobody"), [b"x"]) is SendResult.GONE
    send(edge, Channel.CTL, [b"again"])
    arrival = hub.arrival()
    assert arrival.frames == [b"again"]
    assert arrival.route != route


def test_a_reader_that_does_not_read_fills_up(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    send(edge, Channel.BULK, [b"hello"])
    route = hub.arrival().route
    data = bytes(MAX_FRAME_BYTES)
    results = [hub.transport.send(route, [data]) for _ in range(200)]
    assert results[0] is SendResult.SENT
    assert SendResult.FULL in results


def test_too_many_frames_are_thrown_away_and_the_sender_named(make_hub, first_event: FirstEvent) -> None:
    hub = make_hub(max_frames=3)
    edge = joined(hub, first_event)
    send(edge, Channel.CTL, [b"x"] * 4)
    send(edge, Channel.CTL, [b"x"] * 3)
    first, second = hub.arrival(), hub.arrival()
    assert first.frames == []
    assert first.key == second.key
    assert len(second.frames) == 3
    assert hub.transport.traffic.dropped == 1


@pytest.mark.parametrize(("channel", "size"), [(Channel.CTL, MAX_FRAME_BYTES + 1), (Channel.ENROL, 1025)])
def test_a_frame_over_the_limit_ends_the_connection(hub, first_event: FirstEvent, channel: Channel, size: int) -> None:
    edge = joined(hub, first_event)
    send(edge, channel, [bytes(size - 1)])
    assert len(hub.arrival().frames[0]) == size - 1
    send(edge, channel, [bytes(size)])
    events: list[LinkEvent] = []
    deadline = time.monotonic() + 30
    while Disconnected(channel) not in events and time.monotonic() < deadline:
        edge.poll(0.1)
        events += edge.link_events()
        assert hub.transport.poll(0) == []
    assert Disconnected(channel) in events


def test_wake_from_another_thread(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    for side in (hub.transport, edge):
        timer = threading.Timer(0.05, side.wake)
        timer.start()
        began = time.monotonic()
        assert side.poll(30) == []
        assert time.monotonic() - began < 20
        timer.join()
        for _ in range(100_000):
            side.wake()
        assert side.poll(30) == []
        began = time.monotonic()
        assert side.poll(0.05) == []
        assert time.monotonic() - began > 0.04


def test_a_hub_that_rests_takes_nothing_until_it_is_woken(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    assert edge.send(Channel.CTL, [b"ping"])
    began = time.monotonic()
    hub.transport.rest(0.2)
    assert time.monotonic() - began > 0.19
    hub.transport.wake()
    hub.transport.rest(30)
    assert [arrival.frames for arrival in hub.transport.poll(30)] == [[b"ping"]]
    assert time.monotonic() - began < 20


def test_wake_after_close_does_nothing(make_hub) -> None:
    hub = make_hub()
    hub.transport.close()
    hub.transport.wake()


def test_a_hub_that_comes_back_is_found_again(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    port = hub.transport.ports[Channel.CTL]
    hub.transport.close()
    deadline = time.monotonic() + 30
    events: list[LinkEvent] = []
    while Disconnected(Channel.CTL) not in events and time.monotonic() < deadline:
        edge.poll(0.1)
        events += edge.link_events()
    assert Disconnected(Channel.CTL) in events
    deadline = time.monotonic() + 30
    hub.transport = HubTransport(hub.context, hub.keys, f"tcp://127.0.0.1:{port}")
    while Connected(Channel.CTL) not in events and time.monotonic() < deadline:
        edge.poll(0.1)
        events += edge.link_events()
    send(edge, Channel.CTL, [b"back"])
    assert hub.arrival().frames == [b"back"]


def test_traffic_is_counted_as_it_crosses(hub, first_event: FirstEvent) -> None:
    edge = joined(hub, first_event)
    frames: list[Buffer] = [b"head", bytes(2048)]
    send(edge, Channel.CTL, frames)
    hub.transport.send(hub.arrival().route, frames)
    receive(edge)
    assert wire_bytes(frames) == (4 + 33 + 2) + (2048 + 33 + 9)
    assert edge.traffic.sent == edge.traffic.received == wire_bytes(frames)
    assert hub.transport.traffic.sent == hub.transport.traffic.received == wire_bytes(frames)


@pytest.mark.parametrize("listen", ["", "tcp://", "tcp://127.0.0.1", "tcp://127.0.0.1:99999", "udp://h:1", "h:1"])
def test_where_nobody_can_listen(hub, listen: str) -> None:
    with pytest.raises(InputError, match="tcp://HOST:PORT"):
        HubTransport(hub.context, hub.keys, listen)


def test_a_port_in_use(hub) -> None:
    with pytest.raises(InputError, match="in use"):
        HubTransport(hub.context, hub.keys, hub.transport.endpoints[Channel.BULK])
