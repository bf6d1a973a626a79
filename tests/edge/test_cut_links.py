"""Connections that are reset again and again while requests are under way: nothing is lost, nothing done twice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields as fields_of

import pytest
import zmq

import messaging.messages as m
from edge.client import HubClient
from messaging.access import Gatekeeper
from messaging.console import Journal
from messaging.edge_transport import EdgeTransport
from messaging.errors import ErrorCode
from messaging.framing import decode, encode
from messaging.hub_transport import HubTransport
from messaging.joining import HubAddress
from messaging.keys import new_keys
from messaging.replies import MOST_REPLIES, Busy, Gap, New, Replay, Replies, Stale
from messaging.transport import Arrival, Buffer, Channel, Route
from tools.faults.cutting import CuttingRelay

RECIPE = m.Recipe(1e-3, 4, 8.0, ("q",), 10, 1, 1, 1.0, 0, 0.0, 0)
CREDITS = 1 << 20


class CountingHub:
    """One session over real sockets; it counts what it carries out, and takes a moment for each thing."""

    def __init__(self) -> None:
        self.keys, self.edge_keys = new_keys(), new_keys()
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gatekeeper = Gatekeeper(self.context, self)
        self.transport = HubTransport(self.context, self.keys, "tcp://127.0.0.1:0")
        self._replies = Replies()
        self._routes: dict[int, Route] = {}
        self._working: list[tuple[float, int, m.AnyMessage]] = []
        self._rng = random.Random(5)
        self._end = threading.Event()
        #: how often each request was carried out, in what order the steps were, and the bytes of each request
        self.done: Counter[int] = Counter()
        self.steps: list[tuple[str, int]] = []
        self.seen: dict[int, set[int]] = {}
        self.kinds: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def name_of(self, key: str) -> str | None:
        """For the gatekeeper."""
        return "edge" if key == self.edge_keys.public else None

    @property
    def address(self) -> HubAddress:
        ports = self.transport.ports
        return HubAddress("127.0.0.1", ports[Channel.CTL], ports[Channel.BULK], ports[Channel.ENROL], self.keys.public)

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self.transport.close()
        self._gatekeeper.stop()
        self.context.term()

    def _run(self) -> None:
        while not self._end.is_set():
            for arrival in self.transport.poll(0.005):
                self._take(arrival)
            now = time.monotonic()
            for item in [item for item in self._working if item[0] <= now]:
                self._working.remove(item)
                self._finish(item[1], item[2])

    def _take(self, arrival: Arrival) -> None:
        packet = decode(arrival.frames, m.TO_HUB)
        message, request = packet.message, packet.envelope.request
        if isinstance(message, m.Ping):
            self._send(arrival.route, request, m.Pong(1, 1, 1, 0, 0, 0, 0, 0, 0))
        elif isinstance(message, m.Hello):
            self._send(arrival.route, request, _welcome(self._replies.next))
        else:
            self.seen.setdefault(request, set()).add(hash(b"".join(map(bytes, arrival.frames))))
            self._replies.ack(packet.envelope.ack)
            self._admit(arrival.route, request, message)

    def _admit(self, route: Route, request: int, message: m.AnyMessage) -> None:
        admission = self._replies.admit(request)
        self.kinds[type(admission).__name__] += 1
        match admission:
            case New():
                self._routes[request] = route
                self._working.append((time.monotonic() + self._rng.uniform(0, 0.03), request, message))
            case Replay(frames):
                self.transport.send(route, frames)
            case Busy():
                self._routes[request] = route
                self._send(route, request, m.Error(ErrorCode.BUSY, 0, ""))
            case Stale():
                self._send(route, request, m.Error(ErrorCode.STALE, 0, ""))
            case Gap(expected):
                self._send(route, request, m.Error(ErrorCode.GAP, expected, ""))

    def _finish(self, request: int, message: m.AnyMessage) -> None:
        self.done[request] += 1
        answer: m.AnyMessage
        match message:
            case m.StepForward():
                self.steps.append(("forward", message.step))
                answer = m.StepHidden(message.step, message.smashed)
            case m.StepBackward():
                self.steps.append(("backward", message.step))
                answer = _grad(message)
            case m.Infer():
                answer = m.InferHidden(message.smashed)
            case _:
                raise AssertionError(message)
        frames = encode(m.Packet(answer, self._envelope(request)))
        self._replies.record(request, frames)
        self.transport.send(self._routes.pop(request), frames)

    def _envelope(self, request: int) -> m.Envelope:
        return m.Envelope(7, 3, request, self._replies.next - 1, CREDITS)

    def _send(self, route: Route, request: int, message: m.AnyMessage) -> None:
        self.transport.send(route, encode(m.Packet(message, self._envelope(request))))


def _filled(message: type[m.Message], **known: object) -> m.AnyMessage:
    """A message with these fields, the others empty."""
    words = ("str", "Name", "Text", "Hash", "Key")
    fields = {field.name: "" if any(word in str(field.type) for word in words) else 0 for field in fields_of(message)}
    return message(**{**fields, **known})  # type: ignore[return-value]


def _welcome(next_request: int) -> m.AnyMessage:
    return _filled(m.Welcome, next=next_request, credit_bytes=CREDITS, recipe=RECIPE)


def _grad(message: m.StepBackward) -> m.AnyMessage:
    return _filled(m.StepGrad, step=message.step, grad_smashed=message.grad_hidden)


def _hello() -> m.Hello:
    made = _filled(m.Hello, min_version=1, max_version=1, software="x", name="edge", train=1, p=1, q=1)
    assert isinstance(made, m.Hello)
    return made


@contextmanager
def _linked(seed: int, mean: int) -> Iterator[tuple[CountingHub, HubClient, CuttingRelay]]:
    hub = CountingHub()
    try:
        with CuttingRelay(hub.address, seed, mean) as relay:
            client = HubClient(
                EdgeTransport(relay.address, hub.edge_keys), Journal(), give_up_s=60, rng=random.Random(seed)
            )
            try:
                yield hub, client, relay
            finally:
                client.close()
    finally:
        hub.close()


def _tensor(number: int, nbytes: int) -> m.Tensor:
    data: list[Buffer] = [number.to_bytes(4, "little") * (nbytes // 4)]
    return m.Tensor("u8", (1, 1, nbytes), tuple(data))


def _infer(client: HubClient, count: int, failures: list[str]) -> None:
    """Decoding steps beside the training, each answered with what it sent."""
    for number in range(count):
        tensor = _tensor(1000 + number, 2048)
        reply = client.ask(m.Infer(1, number, 0, (), (), tensor), m.InferHidden)
        if b"".join(map(bytes, reply.hidden.chunks)) != bytes(tensor.chunks[0]):
            failures.append(f"infer {number}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", range(2))
def test_every_step_is_done_once_over_a_link_that_breaks_again_and_again(seed: int) -> None:
    steps, failures = 25, list[str]()
    with _linked(seed, mean=400_000) as (hub, client, relay):
        client.open(_hello())
        beside = threading.Thread(target=_infer, args=(client, 60, failures))
        beside.start()
        for step in range(steps):
            tensor = _tensor(step, 60_000)
            hidden = client.ask(m.StepForward(step, 1, (), tensor), m.StepHidden).hidden
            assert b"".join(map(bytes, hidden.chunks)) == bytes(tensor.chunks[0])
            client.ask(m.StepBackward(step, tensor), m.StepGrad)
        beside.join()
        cuts = relay.cuts
    assert not failures
    assert cuts >= 5
    assert hub.steps == [(kind, step) for step in range(steps) for kind in ("forward", "backward")]
    ordered = {request: times for request, times in hub.done.items() if request < m.UNORDERED_BASE}
    assert ordered == dict.fromkeys(range(1, 2 * steps + 1), 1)
    assert all(len(variants) == 1 for variants in hub.seen.values()), "a request was sent again with other bytes"
    assert hub.kinds["Replay"] + hub.kinds["Busy"] > 0
    assert hub.kinds["Stale"] == 0


@pytest.mark.timeout(60)
def test_requests_under_way_at_once_are_done_once_and_all_answered() -> None:
    with _linked(11, mean=300_000) as (hub, client, relay):
        client.open(_hello())
        told: list[m.AnyMessage] = []
        for first in range(0, 40, MOST_REPLIES):
            steps = range(first, first + MOST_REPLIES)
            futures = [client.submit(m.StepForward(step, 1, (), _tensor(step, 25_000))) for step in steps]
            told += [future.result(timeout=50) for future in futures]
    assert [answer.step for answer in told if isinstance(answer, m.StepHidden)] == list(range(40))
    assert sorted(hub.done.values()) == [1] * 40
    assert relay.cuts >= 3
    assert hub.kinds["Gap"] + hub.kinds["Replay"] + hub.kinds["Busy"] > 0
