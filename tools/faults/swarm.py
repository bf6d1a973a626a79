"""Hundreds of edges in one thread: real sockets and keys and the product's messages, without models and threads."""

from __future__ import annotations

import contextlib
import json
import select
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import psutil
import zmq

import messaging.messages as m
from messaging.framing import decode, encode
from messaging.joining import HubAddress, read_join
from messaging.keys import KeyPair, new_keys
from messaging.messages import UNORDERED_BASE
from messaging.sockets import set_common_options
from messaging.transport import Buffer, Channel
from tools.programs import Hub

POCKET = Path(__file__).parents[2] / "hub" / "pocket"


def hidden_size() -> int:
    """Of the pocket model."""
    return int(json.loads((POCKET / "config.json").read_text())["hidden_size"])


def enrol_all(hub: Hub, names: Iterable[str]) -> list[KeyPair]:
    """Put fresh keys on the hub's allow-list, all at once; it knows them within a moment."""
    given = [(name, new_keys()) for name in names]
    with contextlib.closing(sqlite3.connect(hub.state / "hub.db", timeout=10)) as db, db:
        sql = "INSERT INTO keys (key, origin, name, enrolled_at) VALUES (?, ?, ?, ?)"
        db.executemany(sql, [(keys.public, keys.public, name, time.time()) for name, keys in given])
    time.sleep(1.0)
    return [keys for _, keys in given]


def states(nbytes: int, width: int | None = None) -> m.Tensor:
    """About so many bytes of states of the pocket model, in rows of `width` positions."""
    hidden = hidden_size()
    positions = max(nbytes // (4 * hidden), 1)
    width = min(width or positions, positions)
    rows = positions // width
    data = bytes(4 * hidden * width * rows)
    chunks = [data[at : at + m.MAX_FRAME_BYTES] for at in range(0, len(data), m.MAX_FRAME_BYTES)]
    return m.Tensor("f32", (rows, width, hidden), tuple(chunks))


def memory_mb(pid: int) -> float:
    """What a process has in RAM."""
    return float(psutil.Process(pid).memory_info().rss) / 1e6


class Member:
    """One edge: a DEALER on one channel, what it has asked, and how long the answers took."""

    def __init__(
        self,
        context: zmq.Context[Any],
        hub: HubAddress,
        keys: KeyPair,
        channel: Channel,
        touched: set[Member],
        stuck: bool = False,
    ) -> None:
        self._touched = touched
        self.sock = context.socket(zmq.DEALER)
        set_common_options(self.sock, channel)
        if stuck:
            # It stops reading at the kernel too. Without heartbeats: libzmq's assertion on them would end this process.
            self.sock.setsockopt(zmq.RCVHWM, 1)
            self.sock.setsockopt(zmq.HEARTBEAT_IVL, 0)
        self.sock.setsockopt(zmq.RECONNECT_IVL, 250)
        self.sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self.sock.setsockopt(zmq.CURVE_SERVERKEY, hub.key.encode())
        self.sock.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        self.sock.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self.sock.connect(hub.endpoint(channel))
        self.version = 0
        self.session = m.Envelope()
        #: request -> when it was first sent, when last, and its message
        self.asked: dict[int, tuple[float, float, m.AnyMessage]] = {}
        #: (when, seconds) of each answer
        self.took: list[tuple[float, float]] = []
        self.errors: list[m.Error] = []
        self.stuck = stuck
        self._next = UNORDERED_BASE

    def ask(self, message: m.AnyMessage) -> None:
        """Send a request, if the socket takes it; otherwise `again` does."""
        self._next += 1
        now = time.monotonic()
        self.asked[self._next] = (now, now, message)
        self._send(self._next, message)

    def hello(self) -> None:
        """Ask for a session that generates."""
        versions = {"min_version": m.PROTOCOL_VERSION, "max_version": m.PROTOCOL_VERSION}
        self.session = m.Envelope()
        self.ask(
            m.Hello(
                **versions, software="fault bench", name="swarm", train=0, model_hash="", p=1, q=1, lora_rank=0,
                resume=0, version=-1,
            )
        )  # fmt: skip

    def infer(self, tensor: m.Tensor) -> None:
        """Have states computed, without a cache."""
        self.ask(m.Infer(0, 0, self.version, (), (), tensor))

    def ping(self) -> None:
        """Say that it lives; the answer is not waited for."""
        self._next += 1
        self._send(self._next, m.Ping("idle", 0, 0.0, 0.0, 0.0, 0.0, None))

    def again(self, older_s: float) -> None:
        """Repeat what was not answered for so long."""
        now = time.monotonic()
        for request, (first, last, message) in list(self.asked.items()):
            if now - last > older_s and (self.session.session or isinstance(message, m.Hello)):
                self.asked[request] = (first, now, message)
                self._send(request, message)

    def receive(self) -> None:
        """Take what has come."""
        while cast(int, self.sock.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            packet = decode(self.sock.recv_multipart(), m.TO_EDGE)
            self._take(packet)

    def close(self) -> None:
        """Give the socket back."""
        self.sock.close()

    def _take(self, packet: m.Packet) -> None:
        message, request = packet.message, packet.envelope.request
        if isinstance(message, m.Error):
            self._refused(message, request)
            return
        if isinstance(message, m.Welcome):
            self.version, self.session = message.adapter_version, packet.envelope
        known = self.asked.pop(request, None)
        if known is not None:
            now = time.monotonic()
            self.took.append((now, now - known[0]))

    def _refused(self, message: m.Error, request: int) -> None:
        if message.code == 5:  # NO_SESSION: the hub was restarted
            if self.session.session:
                self.hello()
            return
        if message.code in (11, 22):  # BUSY, LATER
            return
        self.errors.append(message)
        self.asked.pop(request, None)

    def _send(self, request: int, message: m.AnyMessage) -> None:
        session = m.Envelope() if isinstance(message, m.Hello | m.Fetch) else self.session
        envelope = m.Envelope(session.session, session.epoch, request)
        frames: list[Buffer] = encode(m.Packet(message, envelope))
        with contextlib.suppress(zmq.Again):
            self.sock.send_multipart(frames, zmq.DONTWAIT, copy=False)
        # Sending takes the sign away that something has arrived.
        self._touched.add(self)


class Swarm:
    """Such edges, of which `run` reads and `turn` writes. One thread."""

    def __init__(self, hub: Hub, keys: Sequence[KeyPair], channel: Channel = Channel.CTL) -> None:
        self._context: zmq.Context[Any] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, len(keys) + 16)
        self.hub = read_join(hub.join).hub
        self._epoll = select.epoll()
        self.members: list[Member] = []
        self._touched: set[Member] = set()
        self._by_fd: dict[int, Member] = {}
        for pair in keys:
            self.add(pair, channel)

    def __enter__(self) -> Swarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._epoll.close()
        self._context.destroy(linger=0)

    def add(self, keys: KeyPair, channel: Channel = Channel.CTL, stuck: bool = False) -> Member:
        """One more; `stuck`: it is never to be read."""
        member = Member(self._context, self.hub, keys, channel, self._touched, stuck)
        self.members.append(member)
        fd = cast(int, member.sock.getsockopt(zmq.FD))
        self._by_fd[fd] = member
        self._epoll.register(fd, select.EPOLLIN)
        return member

    def join(self, within_s: float) -> float:
        """Open a session each; the seconds that this took. TimeoutError if not all have one in time."""
        begun = time.monotonic()
        for member in self.members:
            member.hello()
        self.run(lambda: all(member.session.session for member in self.members), within_s, "sessions")
        return time.monotonic() - begun

    def run(self, until: Callable[[], object], within_s: float, what: str) -> None:
        """Receive until a condition holds. TimeoutError if it does not in time."""
        deadline = time.monotonic() + within_s
        while not until():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} within {within_s:g} s")
            self.turn(0.02)

    def spend(self, seconds: float, each: Callable[[float], None] = lambda now: None) -> None:
        """Receive for so long; `each` is called with the time, many times a second."""
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            each(now)
            self.turn(0.01)

    def turn(self, wait_s: float) -> None:
        """Receive once."""
        ready = {self._by_fd[fd] for fd, _ in self._epoll.poll(0 if self._touched else wait_s, 4096)}
        ready |= self._touched
        self._touched.clear()
        for member in ready:
            if not member.stuck:
                member.receive()
