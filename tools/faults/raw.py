"""An edge that says whatever it is told to, over real sockets with a real key."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from types import TracebackType

import messaging.messages as m
from messaging.edge_transport import EdgeTransport
from messaging.enrol import enrol
from messaging.framing import decode, encode
from messaging.joining import read_join
from messaging.keys import KeyPair, new_keys
from messaging.transport import Buffer, Channel, Connected, ConnectFailed, FailReason
from tools.programs import PATIENCE_S, Hub


class RawEdge:
    """Enrolled and connected when made. Requests are numbered as an edge numbers them, unless told otherwise."""

    def __init__(self, hub: Hub, name: str, keys: KeyPair | None = None) -> None:
        join = read_join(hub.join)
        if keys is None:
            keys = new_keys()
            enrol(join, keys, name, PATIENCE_S)
        self.keys = keys
        self.transport = EdgeTransport(join.hub, keys)
        self.session = m.Envelope()
        self._unordered = itertools.count(m.UNORDERED_BASE)
        self._ordered = itertools.count(1)
        self._wait_for_link()

    def __enter__(self) -> RawEdge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.transport.close()

    def hello(self, train: bool, p: int = 1, q: int = 1) -> m.Welcome:
        """Open a session."""
        versions = {"min_version": m.PROTOCOL_VERSION, "max_version": m.PROTOCOL_VERSION}
        message = m.Hello(
            **versions, software="fault bench", name="raw", train=int(train), model_hash="", p=p, q=q, lora_rank=0,
            resume=0, version=-1,
        )  # fmt: skip
        packet = self.exchange(m.Packet(message, m.Envelope(request=next(self._unordered))))
        assert isinstance(packet.message, m.Welcome), packet.message
        self.session = packet.envelope
        self._ordered = itertools.count(packet.message.next)
        return packet.message

    def ask(self, message: m.AnyMessage) -> m.AnyMessage:
        """A request of the open session, numbered as its kind wants it, and the answer."""
        request = next(self._ordered if message.ordered else self._unordered)
        envelope = m.Envelope(self.session.session, self.session.epoch, request)
        return self.exchange(m.Packet(message, envelope)).message

    def exchange(self, packet: m.Packet, timeout_s: float = PATIENCE_S) -> m.Packet:
        """Send a request and wait for its answer; what else arrives meanwhile is dropped. TimeoutError without one."""
        self.send(encode(packet))
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for _, frames in self.transport.poll(0.1):
                answer = decode(frames, m.TO_EDGE)
                if answer.envelope.request == packet.envelope.request:
                    return answer
        raise TimeoutError(f"the hub does not answer {type(packet.message).__name__}")

    def said(self, frames: Sequence[Buffer], timeout_s: float = PATIENCE_S) -> m.AnyMessage:
        """Send frames that are no message, and what the hub says next. TimeoutError if it says nothing."""
        self.send(frames)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for _, answer in self.transport.poll(0.1):
                return decode(answer, m.TO_EDGE).message
        raise TimeoutError("the hub says nothing")

    def send(self, frames: Sequence[Buffer]) -> None:
        """Send these frames as they are, as soon as the socket takes them."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.transport.send(Channel.CTL, frames):
            self.transport.poll(0.05)
            assert time.monotonic() < deadline, "the hub takes no more"

    def _wait_for_link(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self.transport.poll(0.1)
            for event in self.transport.link_events():
                if isinstance(event, Connected):
                    return
                # A handshake may take too long on a busy machine; libzmq tries again.
                assert event in [ConnectFailed(channel, FailReason.UNREACHABLE) for channel in Channel], event
        raise TimeoutError("no connection to the hub")
