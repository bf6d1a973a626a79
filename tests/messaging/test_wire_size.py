"""What one decoded token costs, counted on the TCP connection by a relay between edge and hub."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from messaging.edge_transport import EdgeTransport
from messaging.framing import decode, encode
from messaging.messages import (
    TO_EDGE,
    TO_HUB,
    UNORDERED_BASE,
    Envelope,
    Infer,
    InferHidden,
    Packet,
    Tensor,
    nbytes_of,
)
from messaging.transport import Channel, Connected, LinkEvent, SendResult, wire_bytes


class Relay:
    """Passes one TCP connection on and counts its bytes."""

    def __init__(self, target_port: int) -> None:
        self.to_hub = 0
        self.to_edge = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._target_port = target_port
        self._end_near, self._end_far = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        edge, _ = self._listener.accept()
        hub = socket.create_connection(("127.0.0.1", self._target_port))
        with selectors.DefaultSelector() as selector, edge, hub:
            for sock in (edge, hub, self._end_near):
                selector.register(sock, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._end_near:
                        return
                    data = key.fileobj.recv(65536)  # type: ignore[union-attr]
                    if key.fileobj is edge:
                        self.to_hub += len(data)
                        hub.sendall(data)
                    else:
                        self.to_edge += len(data)
                        edge.sendall(data)

    def close(self) -> None:
        self._end_far.send(b"\0")
        self._thread.join()
        for sock in (self._listener, self._end_near, self._end_far):
            sock.close()


@pytest.fixture
def relay(hub) -> Iterator[Relay]:
    relay = Relay(hub.transport.ports[Channel.CTL])
    yield relay
    relay.close()


@pytest.mark.parametrize(
    ("dtype", "hidden", "most"),
    [("f32", 512, 2048 + 192), ("bf16", 512, 1024 + 192), ("q8", 512, 512 + 160), ("q8", 8192, 8192 + 160)],
)
def test_one_decoded_token_costs_its_hidden_state_and_a_little(
    hub, relay: Relay, first_event: Callable[[EdgeTransport], LinkEvent], dtype: str, hidden: int, most: int
) -> None:
    edge = hub.edge(hub.enrolled(), replace(hub.address, ctl=relay.port))
    assert first_event(edge) == Connected(Channel.CTL)
    state = Tensor(dtype, (1, 1, hidden), (bytes(nbytes_of(dtype, (hidden,))),))
    envelope = Envelope(1 << 20, 70_000, UNORDERED_BASE + 5, 70_000, 0, 600_000)
    question = encode(Packet(Infer(7, 70_000, 70_000, (0, 70_000), (), state), envelope))

    before = relay.to_hub
    assert edge.send(Channel.CTL, question)
    arrival = hub.arrival()
    assert isinstance(decode(arrival.frames, TO_HUB).message, Infer)
    asked = relay.to_hub - before

    answer = encode(Packet(InferHidden(state), replace(envelope, credits=1 << 40)))
    before = relay.to_edge
    assert hub.transport.send(arrival.route, answer) is SendResult.SENT
    assert isinstance(decode(edge.poll(5)[0][1], TO_EDGE).message, InferHidden)
    answered = relay.to_edge - before

    assert (asked, answered) == (wire_bytes(question), wire_bytes(answer))
    assert max(asked, answered) <= most
