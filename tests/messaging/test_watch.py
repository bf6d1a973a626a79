"""The watch over a hub's connections: counting, naming, cutting. Real sockets on loopback."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import zmq

from messaging import watch
from messaging.access import Approval
from messaging.connections import Connection, can_count
from messaging.edge_transport import EdgeTransport
from messaging.keys import KeyPair
from messaging.messages import MAX_FRAME_BYTES
from messaging.sockets import Socket
from messaging.transport import Allowance, Channel, LinkEvent, Offence, SendResult
from messaging.watch import Approvals, condemn

pytestmark = pytest.mark.skipif(not can_count(), reason="this system does not count the bytes of connections")

AMPLE = Allowance(1 << 30, 1 << 30)
#: What glibc may keep of a thread's freed memory for that thread, out of reach of malloc_trim: twice the largest
#: block that was ever given back to the system, but not more than this. Freeing such a block makes it so.
KEPT_BYTES = 64 << 20
FirstEvent = Callable[[EdgeTransport], LinkEvent]


@contextmanager
def dealer(hub, keys: KeyPair, channel: Channel = Channel.BULK) -> Iterator[Socket]:
    """A socket that keeps to no limits."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVHWM, 1)
        sock.setsockopt(zmq.CURVE_SERVERKEY, hub.keys.public.encode())
        sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        sock.connect(hub.address.endpoint(channel))
        yield sock


def flood(sock: Socket, megabytes: int = 200) -> None:
    """One message of that many megabytes, all of them the same."""
    frame = zmq.Frame(bytes(MAX_FRAME_BYTES))
    for _ in range(megabytes):
        sock.send(frame, zmq.SNDMORE, copy=False)
    sock.send(b"")


def keep_as_much_as_can_be() -> None:
    """Bring the C library into the state that it is in after a large tensor was freed."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.free(library.malloc((32 << 20) - 4096))


def look(hub, allowance: Allowance, within_s: float = 60.0) -> list[Offence]:
    """Look again and again until somebody is cut. Takes nothing meanwhile, or a large message might come in whole."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        time.sleep(0.01)
        if found := hub.transport.look(allowance):
            return list(found)
    return []


@contextmanager
def tcp() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            yield near, far


def test_the_kernel_counts_what_a_connection_received_and_what_its_peer_acknowledged() -> None:
    with tcp() as (near, far):
        connection = Connection(Channel.CTL, far.fileno(), 0.0)
        near.sendall(bytes(1000))
        far.sendall(bytes(300))
        assert far.recv(1000, socket.MSG_WAITALL) == bytes(1000)
        near.recv(300, socket.MSG_WAITALL)
        deadline = time.monotonic() + 30
        while connection.read() and connection.acked < 300 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (connection.received, connection.acked) == (1000, 300)
        assert connection.peer() == "127.0.0.1"
        assert connection.cut()
        assert near.recv(10) == b""


def test_a_descriptor_that_is_somebody_elses_now_is_left_alone() -> None:
    with tcp() as (_, first), tcp() as (other, second):
        connection = Connection(Channel.CTL, first.fileno(), 0.0)
        assert connection.read()
        os.dup2(second.fileno(), first.fileno())
        assert not connection.read()
        assert not connection.cut()
        assert connection.peer() == ""
        other.settimeout(0.1)
        with pytest.raises(TimeoutError):
            other.recv(10)
    with open(os.devnull) as file:
        assert not Connection(Channel.CTL, file.fileno(), 0.0).read()
    assert not Connection(Channel.CTL, 1 << 20, 0.0).read()


def test_reading_leaves_no_descriptors_behind() -> None:
    with tcp() as (_, far):
        before = len(os.listdir("/proc/self/fd"))
        for fd in (far.fileno(), 1 << 20):
            for _ in range(50):
                Connection(Channel.CTL, fd, 0.0).read()
        # Threads of tests before may close theirs just now.
        assert len(os.listdir("/proc/self/fd")) <= before


def test_what_was_taken_and_sent_is_counted_to_the_byte(hub, first_event: FirstEvent) -> None:
    edge = hub.edge(hub.enrolled())
    first_event(edge)
    sizes = (1, 200, 255 - 33, 256 - 33, 5000, MAX_FRAME_BYTES)
    for size in sizes:
        while not edge.send(Channel.CTL, [b"head", bytes(size)]):
            edge.poll(0.01)
        arrival = hub.arrival()
        assert hub.transport.send(arrival.route, [bytes(size)]) is SendResult.SENT
        while not edge.poll(0.1):
            pass
    (connection,) = hub.transport._watch._channels[Channel.CTL]
    deadline = time.monotonic() + 30
    # The kernel may put its acknowledgement off.
    while connection.read() and connection.unread and time.monotonic() < deadline:
        time.sleep(0.01)
    # The rest is the handshake's.
    assert 0 <= connection.received - connection.delivered < 1000
    assert connection.key == edge._keys.public
    assert connection.unread == 0
    assert hub.transport.look(AMPLE) == []


@pytest.mark.parametrize("speaks", [True, False])
def test_a_message_without_an_end_is_cut_and_its_sender_named(hub, first_event: FirstEvent, speaks: bool) -> None:
    good = hub.edge(hub.enrolled("good"))
    first_event(good)
    bad = hub.enrolled("bad")
    while not good.send(Channel.CTL, [b"x"]):
        good.poll(0.01)
    hub.arrival()
    with open("/proc/self/statm", "rb") as statm, dealer(hub, bad) as sock:
        keep_as_much_as_can_be()
        before = watch.resident_bytes(statm.fileno())
        if speaks:
            sock.send(b"hello")
            assert hub.arrival().key == bad.public
        flood(sock)
        (offence,) = look(hub, Allowance(150 << 20, 1 << 30))
        assert (offence.key, offence.channel, offence.endless) == (bad.public, Channel.BULK, True)
        assert offence.address == "127.0.0.1"
        assert offence.size > 150 << 20
        # libzmq's own thread frees the memory, when it gets its turn.
        deadline = time.monotonic() + 60
        while watch.resident_bytes(statm.fileno()) >= before + KEPT_BYTES + (20 << 20):
            assert time.monotonic() < deadline, "the memory does not come back"
            assert hub.transport.look(AMPLE) == []
            time.sleep(0.05)
        assert not [arrival for arrival in hub.waiting if len(arrival.frames) > 1]
    while not good.send(Channel.CTL, [b"still here"]):
        good.poll(0.01)
    assert hub.arrival().frames == [b"still here"]


def test_memory_is_given_back_again_and_again_after_a_cut_and_then_no_more() -> None:
    trims = watch.Trims()
    assert not trims.due(0.0)
    trims.cut(100.0)
    assert [s for s in range(100) if trims.due(100.0 + s)] == [1, 2, 4, 8, 16]


def test_many_cuts_do_not_put_the_giving_back_off() -> None:
    trims = watch.Trims()
    given_back = 0
    for tenth in range(100):
        trims.cut(tenth / 10)
        given_back += trims.due(tenth / 10)
    assert given_back == 9


def test_all_together_may_not_have_too_much_and_the_greatest_goes(hub) -> None:
    with dealer(hub, hub.enrolled("large")) as sock:
        flood(sock, 60)
        (offence,) = look(hub, Allowance(1 << 30, 10 << 20))
        assert not offence.endless


def test_a_large_whole_message_that_waits_is_within_the_allowance(hub) -> None:
    with dealer(hub, hub.enrolled()) as sock:
        flood(sock, 40)
        time.sleep(1.0)
        assert hub.transport.look(AMPLE) == []
        arrival = hub.arrival()
        assert len(arrival.frames) in (0, 41)  # more than the hub of this test takes, and thrown away
        time.sleep(0.1)
        assert hub.transport.look(Allowance(0, 0)) == []


def test_a_reader_that_does_not_read_shows_and_can_be_cut(hub) -> None:
    keys = hub.enrolled()
    with dealer(hub, keys) as sock:
        sock.send(b"hello")
        route = hub.arrival().route
        data = bytes(MAX_FRAME_BYTES)
        sent = 0
        while hub.transport.send(route, [data]) is SendResult.SENT:
            sent += MAX_FRAME_BYTES
            time.sleep(0.005)
        assert 0 < hub.transport.unread(route, 0) < sent
        assert hub.transport.cut(route) == keys.public
        deadline = time.monotonic() + 60
        while hub.transport.send(route, [b""]) is not SendResult.GONE:
            assert time.monotonic() < deadline
            hub.transport.poll(0.01)
        hub.transport.look(AMPLE)
        assert hub.transport.unread(route, 0) == 0
        assert hub.transport.cut(route) is None


def test_connections_that_ended_are_forgotten(hub, first_event: FirstEvent) -> None:
    channel = hub.transport._watch._channels[Channel.CTL]
    for _ in range(3):
        edge = hub.edge(hub.enrolled())
        first_event(edge)
        while not edge.send(Channel.CTL, [b"x"]):
            edge.poll(0.01)
        hub.arrival()
        edge.close()
    deadline = time.monotonic() + 60
    while len(channel) and time.monotonic() < deadline:
        time.sleep(0.02)
        hub.transport.look(AMPLE)
    assert len(channel) == 0
    assert not channel._by_route


def connection(at: float = 0.0, channel: Channel = Channel.BULK, key: str | None = None) -> Connection:
    return Connection(channel, 5, at, key)


def test_who_is_condemned() -> None:
    a, b, c, small = connection(), connection(), connection(), connection(channel=Channel.ENROL)
    megabyte = 1 << 20
    assert condemn({a: 90 * megabyte, b: 10 * megabyte}, Allowance(100 * megabyte, 100 * megabyte)) == []
    assert condemn({a: 109 * megabyte, b: 0}, Allowance(100 * megabyte, 1 << 40)) == [(a, True)]
    # Together too much: the greatest first, and no more than has to be.
    sizes = {a: 50 * megabyte, b: 90 * megabyte, c: 60 * megabyte}
    assert condemn(sizes, Allowance(100 * megabyte, 120 * megabyte)) == [(b, False)]
    assert condemn(sizes, Allowance(100 * megabyte, 50 * megabyte)) == [(b, False), (c, False)]
    # What any connection may have is nobody's fault.
    assert condemn({connection(): megabyte for _ in range(500)}, Allowance(100 * megabyte, 0)) == []
    assert condemn({small: 9 * megabyte}, Allowance(1 << 40, 1 << 40)) == [(small, True)]


def test_only_one_key_in_question_is_a_name() -> None:
    approved: list[Approval] = []

    def take() -> list[Approval]:
        found = approved.copy()
        approved.clear()
        return found

    approvals = Approvals(take)
    approved += [Approval("good", "10.0.0.1", 100.1), Approval("bad", "10.0.0.1", 100.2)]
    assert approvals.guess(connection(100.0), "10.0.0.1") is None
    approvals.identified(connection(100.0, key="good"))
    assert approvals.guess(connection(100.0), "10.0.0.1") == "bad"
    assert approvals.guess(connection(100.0), "10.0.0.2") is None
    assert approvals.guess(connection(50.0), "10.0.0.1") is None
    assert approvals.guess(connection(200.0), "10.0.0.1") is None
    assert approvals.guess(connection(100.0, Channel.ENROL), "10.0.0.1") is None


def _hub_that_is_slow() -> None:
    """In a process of its own: messages wait, their sender goes away, and a heartbeat is due."""
    from messaging import sockets
    from tests.messaging.conftest import LoopbackHub

    sockets._HEARTBEAT_MS = 200
    hub = LoopbackHub()
    with dealer(hub, hub.enrolled()) as sock:
        for _ in range(4000):
            sock.send(bytes(5000))
        time.sleep(1.0)
    time.sleep(1.0)
    received = 0
    while arrivals := hub.transport.poll(0.2):
        received += len(arrivals)
    assert received > 64
    os._exit(17)


def test_a_sender_that_goes_away_while_its_messages_wait_does_not_end_the_process() -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hub_that_is_slow)
    process.start()
    process.join(60)
    assert process.exitcode == 17
