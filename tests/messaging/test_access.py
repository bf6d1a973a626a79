"""Who gets in: the ZAP handler with real sockets on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import zmq

from messaging.access import Gate, Gatekeeper
from messaging.edge_transport import EdgeTransport
from messaging.keys import KeyPair, new_keys
from messaging.transport import Channel, Connected, ConnectFailed, FailReason, LinkEvent

FirstEvent = Callable[[EdgeTransport], LinkEvent]


def test_an_enrolled_key_passes_and_is_the_identity(hub, first_event: FirstEvent) -> None:
    keys = hub.enrolled()
    edge = hub.edge(keys)
    assert first_event(edge) == Connected(Channel.CTL)
    assert edge.send(Channel.CTL, [b"hello"])
    arrival = hub.arrival()
    assert arrival.key == keys.public
    assert arrival.frames == [b"hello"]
    assert arrival.route.channel is Channel.CTL


def test_an_unknown_key_is_told_so(hub, first_event: FirstEvent) -> None:
    edge = hub.edge(new_keys())
    assert first_event(edge) == ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)
    assert not edge.send(Channel.CTL, [b"hello"])
    assert hub.transport.poll(0.05) == []


def test_after_enrolment_a_reset_lets_it_in(hub, first_event: FirstEvent) -> None:
    keys = new_keys()
    edge = hub.edge(keys)
    assert isinstance(first_event(edge), ConnectFailed)
    hub.names.enrolled[keys.public] = "late"
    edge.reset()
    assert first_event(edge) == Connected(Channel.CTL)


def test_another_hub_key_is_told_apart(hub, first_event: FirstEvent) -> None:
    edge = hub.edge(hub.enrolled(), replace(hub.address, key=new_keys().public))
    assert first_event(edge) == ConnectFailed(Channel.CTL, FailReason.WRONG_HUB_KEY)
    assert hub.transport.poll(0.05) == []


def test_nobody_there_is_told_apart(hub, first_event: FirstEvent) -> None:
    with socket.socket() as closed:  # bound, but not listening: connections are refused
        closed.bind(("127.0.0.1", 0))
        address = replace(hub.address, ctl=closed.getsockname()[1])
        assert first_event(hub.edge(new_keys(), address)) == ConnectFailed(Channel.CTL, FailReason.UNREACHABLE)


def test_the_enrol_socket_takes_every_key(hub, first_event: FirstEvent) -> None:
    keys = new_keys()
    edge = hub.edge(keys)
    assert isinstance(first_event(edge), ConnectFailed)
    edge.send(Channel.ENROL, [b"token"])
    while not edge.send(Channel.ENROL, [b"token"]):
        edge.poll(0.1)
        edge.link_events()
    arrival = hub.arrival()
    assert (arrival.key, arrival.route.channel) == (keys.public, Channel.ENROL)


def test_a_failing_allow_list_refuses_and_the_next_edge_joins(hub, first_event: FirstEvent) -> None:
    hub.names.broken = True
    for _ in range(1000):
        status, _, user = hub.gatekeeper.judge(b"edge", b"CURVE", [bytes(32)])
        assert (status, user) == (b"500", "")
    edge = hub.edge(hub.enrolled())
    assert first_event(edge) == ConnectFailed(Channel.CTL, FailReason.HUB_TROUBLE)
    assert hub.gatekeeper.failures == 1001
    assert hub.gatekeeper.alive()
    hub.names.broken = False
    edge.reset()
    assert first_event(edge) == Connected(Channel.CTL)


@pytest.mark.parametrize(
    ("domain", "mechanism", "credentials"),
    [
        (b"edge", b"NULL", []),
        (b"enrol", b"PLAIN", [b"user", b"password"]),
        (b"enrol", b"CURVE", [bytes(31)]),
        (b"enrol", b"CURVE", []),
        (b"", b"CURVE", [bytes(32)]),
        (b"other", b"CURVE", [bytes(32)]),
        (b"\xff", b"CURVE", [bytes(32)]),
    ],
)
def test_everything_else_is_refused(hub, domain: bytes, mechanism: bytes, credentials: list[bytes]) -> None:
    assert hub.gatekeeper.judge(domain, mechanism, credentials)[0] == b"400"


def test_without_gatekeeper_nobody_gets_in(hub) -> None:
    keys = hub.enrolled()
    assert hub.gatekeeper.alive()
    hub.gatekeeper.stop()
    assert not hub.gatekeeper.alive()
    edge = hub.edge(keys)
    edge.poll(0.3)
    assert Connected(Channel.CTL) not in edge.link_events()
    assert hub.transport.poll(0) == []
    hub.gatekeeper = Gatekeeper(hub.context, hub.names)
    assert hub.gatekeeper.alive()


def test_the_handler_survives_malformed_requests(hub, first_event: FirstEvent) -> None:
    stranger = hub.context.socket(zmq.DEALER)
    stranger.setsockopt(zmq.LINGER, 0)
    stranger.connect("inproc://zeromq.zap.01")
    for frames in ([b""], [b"", b"1.0"], [b"", b"2.0", *[b"x"] * 9], [b"x"] * 30):
        stranger.send_multipart(frames)
    assert first_event(hub.edge(hub.enrolled())) == Connected(Channel.CTL)
    stranger.close()


def test_a_context_that_ends_first_ends_the_handler() -> None:
    context = zmq.Context()
    gatekeeper = Gatekeeper(context, object())  # type: ignore[arg-type]
    context.term()
    gatekeeper.stop()
    assert not gatekeeper.alive()


def test_no_plain_connection(hub) -> None:
    """A socket without CURVE sends into the void."""
    context = zmq.Context()
    plain = context.socket(zmq.DEALER)
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(hub.transport.endpoints[Channel.ENROL])
    plain.send(b"hello")
    assert hub.transport.poll(0.2) == []
    plain.close()
    context.term()


# -- the gate: a gatekeeper that is replaced when it dies ------------------------------------------


@pytest.fixture
def gate(hub) -> Gate:
    """The hub's gatekeeper in a gate."""
    hub.gatekeeper.stop()
    gate = Gate(hub.context, hub.names)
    hub.gatekeeper = gate
    return gate


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def refused(hub, keys: KeyPair) -> bool:
    edge = hub.edge(keys)
    edge.poll(0.3)
    return Connected(Channel.CTL) not in edge.link_events() and hub.transport.poll(0) == []


def test_a_dead_gatekeeper_is_told_and_replaced(
    hub, gate: Gate, first_event: FirstEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = hub.enrolled()
    assert first_event(hub.edge(keys)) == Connected(Channel.CTL)
    assert gate.check() is None
    with monkeypatch.context() as patch:

        def die(keeper: Gatekeeper) -> None:
            raise RuntimeError("nobody thought of this")

        patch.setattr(Gatekeeper, "_answer_one", die)
        assert refused(hub, keys)
        wait_until(gate._keeper.ended)
    assert refused(hub, keys)
    assert refused(hub, new_keys())
    news = gate.check()
    assert news is not None
    assert "ALARM" in news
    assert "nobody thought of this" in news
    assert gate.check() is None
    assert first_event(hub.edge(keys)) == Connected(Channel.CTL)
    assert first_event(hub.edge(new_keys())) == ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)


def test_a_gatekeeper_that_hangs_is_told_and_its_return_too(
    hub, gate: Gate, first_event: FirstEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("messaging.access._SILENT_S", 1.0)
    monkeypatch.setattr("messaging.access._BEAT_S", 0.05)
    keys, stuck = hub.enrolled(), threading.Event()
    name_of = hub.names.name_of
    hub.names.name_of = lambda key: (stuck.wait(60), name_of(key))[1]
    edge = hub.edge(keys)
    wait_until(lambda: not gate._keeper.alive())
    news = gate.check()
    assert news is not None
    assert "has not answered" in news
    assert gate.check() is None
    stuck.set()
    assert first_event(edge) == Connected(Channel.CTL)
    wait_until(gate._keeper.alive)
    wait_until(lambda: "answered again" in str(gate.check()))


def test_a_failing_list_is_told_now_and_then(hub, gate: Gate, first_event: FirstEvent) -> None:
    hub.names.broken = True
    for _ in range(3):
        assert first_event(hub.edge(new_keys())) == ConnectFailed(Channel.CTL, FailReason.HUB_TROUBLE)
    assert "failed 3 times (OSError('the disk is gone'))" in str(gate.check())
    assert first_event(hub.edge(new_keys())) == ConnectFailed(Channel.CTL, FailReason.HUB_TROUBLE)
    assert gate.check() is None


def test_whom_it_turns_away_is_told_with_address_and_key(hub, first_event: FirstEvent) -> None:
    hub.gatekeeper.stop()
    seen = []

    def witness(*facts: str) -> None:
        seen.append(facts)
        raise OSError("the log is full")

    hub.gatekeeper = Gatekeeper(hub.context, hub.names, witness)
    stranger, keys = new_keys(), hub.enrolled()
    assert first_event(hub.edge(stranger)) == ConnectFailed(Channel.CTL, FailReason.NOT_ENROLLED)
    assert first_event(hub.edge(keys)) == Connected(Channel.CTL)
    assert seen == [(stranger.public, "127.0.0.1", "not enrolled")]
    assert hub.gatekeeper.failures == 1
