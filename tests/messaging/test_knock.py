"""Knocking: a port that comes alive is found within a second, whatever it did before."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from messaging.edge_transport import EdgeTransport
from messaging.joining import HubAddress
from messaging.knock import Knocker
from messaging.transport import Connected, LinkEvent, Reachable


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def knock() -> object:
    begun: list[Knocker] = []

    def make(host: str, port: int) -> tuple[Knocker, threading.Event]:
        answered = threading.Event()
        begun.append(Knocker(host, port, answered.set))
        return begun[-1], answered

    yield make
    for knocker in begun:
        knocker.stop()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_open_port_is_found_at_once(knock: Callable[..., tuple[Knocker, threading.Event]], host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        knocker, answered = knock(host, server.getsockname()[1])
        assert answered.wait(30)
        assert knocker.accepted


def test_all_addresses_of_a_name_are_tried(
    knock: Callable[..., tuple[Knocker, threading.Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As localhost is ::1 first on many machines, and the hub listens at 127.0.0.1 alone."""
    shut, stream = free_port(), (socket.AF_INET, socket.SOCK_STREAM, 0, "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        addresses = [(*stream, ("127.0.0.1", shut)), (*stream, server.getsockname())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: addresses)
        _, answered = knock("hub.example", 1)
        assert answered.wait(30)


def test_a_port_that_refuses_is_tried_until_it_is_open(knock: Callable[..., tuple[Knocker, threading.Event]]) -> None:
    port = free_port()
    knocker, answered = knock("127.0.0.1", port)
    assert not answered.wait(1.2)
    assert not knocker.accepted
    with socket.create_server(("127.0.0.1", port)):
        assert answered.wait(30)


def test_where_no_packet_gets_through_fresh_ones_are_sent(
    knock: Callable[..., tuple[Knocker, threading.Event]],
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        # A full backlog swallows what comes, as a dead link does.
        filling = [socket.socket() for _ in range(4)]
        for sock in filling:
            sock.setblocking(False)
            sock.connect_ex(server.getsockname())
        _, answered = knock("127.0.0.1", server.getsockname()[1])
        assert not answered.wait(1.2)
        began = time.monotonic()
        for sock in filling:
            sock.close()
        server.setblocking(True)
        server.settimeout(0.2)
        while not answered.is_set() and time.monotonic() < began + 60:
            try:
                server.accept()[0].close()
            except TimeoutError:
                continue
        assert answered.is_set()


def test_an_address_without_a_route_is_no_answer(knock: Callable[..., tuple[Knocker, threading.Event]]) -> None:
    # The connection fails before a packet is sent.
    knocker, answered = knock("255.255.255.255", 9)
    assert not answered.wait(0.8)
    assert not knocker.accepted


def test_it_ends_when_told_to(knock: Callable[..., tuple[Knocker, threading.Event]]) -> None:
    before = threading.active_count()
    knocker, answered = knock("127.0.0.1", free_port())
    knocker.stop()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threading.active_count() <= before
    assert not answered.is_set()


def events_of(edge: EdgeTransport, wanted: type[LinkEvent], timeout_s: float) -> list[LinkEvent]:
    """What happens to a link until something of a kind does, or the time is over."""
    deadline, found = time.monotonic() + timeout_s, list[LinkEvent]()
    while time.monotonic() < deadline and not any(isinstance(event, wanted) for event in found):
        edge.poll(0.05)
        found += edge.link_events()
    return found


def test_a_hub_that_is_back_is_told_of_while_the_dial_still_waits(hub) -> None:  # type: ignore[no-untyped-def]
    keys = hub.enrolled()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as dead:
        port = dead.getsockname()[1]
        filling = [socket.socket() for _ in range(4)]
        for sock in filling:
            sock.setblocking(False)
            sock.connect_ex(dead.getsockname())
        address = HubAddress("127.0.0.1", port, port, port, hub.address.key)
        edge = hub.edge(keys, address)
        assert not any(isinstance(event, Reachable | Connected) for event in events_of(edge, Reachable, 1.5))
        for sock in filling:
            sock.close()
        dead.settimeout(0.1)
        found: list[LinkEvent] = []
        for _ in range(100):
            with suppress(TimeoutError):
                dead.accept()[0].close()
            found += events_of(edge, Reachable, 0.02)
            if found:
                break
    # It is found by the knocks, or by a dial that libzmq sends again just then.
    assert found


def test_nobody_knocks_while_the_link_is_up(hub, first_event) -> None:  # type: ignore[no-untyped-def]
    edge = hub.edge(hub.enrolled())
    assert isinstance(first_event(edge), Connected)
    assert not events_of(edge, Reachable, 1.5)
    assert edge._knocker is None
