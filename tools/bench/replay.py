"""Edges without a model: they send what a real edge sent, and wait as long as it worked.

A recording holds some steps of a real `edge join`, as it asked for them on the wire, and the seconds that it worked
in between: Blocks C with the loss (`between_s`), and its backward through A, optimizer and A's next forward
(`before_s`). A replayed edge enrols, opens a training session and asks the same through `HubClient`, over real
sockets. So any number of edges take the core of one and little of that, each as fast as if it had a machine of its
own, and what is measured is the hub.

The link is added waits: half of the round trip before each request and half after each answer. They are exact, and
ask no relay to compete for the edges' core; what they leave out is the link's bandwidth.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

import edge.connection
import messaging.messages as m
from blocks.partition import Partition
from edge.client import HubClient
from edge.connection import SOFTWARE, Connection
from edge.state import EdgeState
from messaging.console import Journal
from messaging.framing import decode, encode

PARTITION = Partition(1, 1)
#: Steps of the real edge that do not count: caches and allocators are cold.
_WARM = 2


@dataclass(frozen=True)
class Recording:
    """Steps as they were asked for, each a forward and a backward, and medians of the edge's own seconds."""

    steps: tuple[tuple[m.StepForward, m.StepBackward], ...]
    before_s: float
    between_s: float

    @property
    def edge_s(self) -> float:
        """The edge's own part of a step."""
        return self.before_s + self.between_s

    def write(self, path: Path) -> None:
        """As the wire's own frames."""
        steps = [[_encoded(asked) for asked in step] for step in self.steps]
        path.write_bytes(msgpack.packb([self.before_s, self.between_s, steps]))

    @classmethod
    def read(cls, path: Path) -> Recording:
        """What `write` wrote."""
        before_s, between_s, steps = msgpack.unpackb(path.read_bytes())
        return cls(tuple((_decoded(first), _decoded(second)) for first, second in steps), before_s, between_s)


def _encoded(message: m.AnyMessage) -> list[bytes]:
    return [bytes(frame) for frame in encode(m.Packet(message))]


def _decoded(frames: list[bytes]) -> Any:
    return decode(frames, m.TO_HUB).message


# --- recording ---------------------------------------------------------------------------------------


class _Recorder:
    """Notes what a training edge asks for, when, and when it is answered."""

    def __init__(self) -> None:
        #: (the request's frames, when it was asked, when it was answered)
        self.asked: list[tuple[list[bytes], float, float]] = []

    def note(self, message: m.AnyMessage, asked_at: float, answer: Future[m.AnyMessage]) -> None:
        answered_at = time.perf_counter()
        if isinstance(message, m.StepForward | m.StepBackward) and answer.exception() is None:
            self.asked.append((_encoded(message), asked_at, answered_at))

    def recording(self) -> Recording:
        """What was noted, but for the first steps. ValueError unless forward and backward followed each other."""
        forwards, backwards = self.asked[0::2], self.asked[1::2]
        steps = [(_decoded(one), _decoded(other)) for (one, *_), (other, *_) in zip(forwards, backwards, strict=True)]
        for forward, backward in steps:
            kinds = isinstance(forward, m.StepForward) and isinstance(backward, m.StepBackward)
            if not kinds or forward.step != backward.step:
                raise ValueError("only an edge that takes one step after the other can be recorded")
        between = [asked - answered for (_, _, answered), (_, asked, _) in zip(forwards, backwards, strict=True)]
        before = [asked - answered for (_, _, answered), (_, asked, _) in zip(backwards, forwards[1:], strict=False)]
        return Recording(tuple(steps[_WARM:]), statistics.median(before[_WARM:]), statistics.median(between[_WARM:]))


def record(join: str, state: str, model: str, data: str, steps: int, out: str) -> dict[str, float]:
    """Train by `edge join`, `steps` steps of 4 x 128 after some that do not count; write the recording to `out`."""
    from tools.bench import training

    recorder = _Recorder()
    with _recorded(recorder):
        training.train(join, state, model, data, steps + _WARM)
    recording = recorder.recording()
    recording.write(Path(out))
    return {"before_s": recording.before_s, "between_s": recording.between_s}


@contextlib.contextmanager
def _recorded(recorder: _Recorder) -> Iterator[None]:
    class Client(HubClient):
        def submit(self, message: m.AnyMessage, deadline_s: float = float("inf")) -> Future[m.AnyMessage]:
            asked_at = time.perf_counter()
            answer = super().submit(message, deadline_s)
            answer.add_done_callback(partial(recorder.note, message, asked_at))
            return answer

    edge.connection.HubClient = Client  # type: ignore[misc]
    try:
        yield
    finally:
        edge.connection.HubClient = HubClient  # type: ignore[misc]


# --- replaying ---------------------------------------------------------------------------------------


class ReplayedEdge:
    """One edge of a recording, enrolled with `join` under a state folder of its own. `link_s`: the round trip."""

    def __init__(self, join: str, state: Path, recording: Recording, link_s: float) -> None:
        self._recording = recording
        self._half_s = link_s / 2
        self._connection = Connection(EdgeState(state), Journal(), join, state.name)
        self._client = self._connection.client
        #: steps that the hub has of this edge
        self.step = 0

    def enter(self) -> None:
        """Open a training session: from here on the hub waits for this edge's steps."""
        asked = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, SOFTWARE)
        welcome = self._connection.hello(PARTITION, True, self._client.ask(asked, m.Description))
        self.step = welcome.applied

    def take(self, steps: int) -> None:
        """So many steps, one after the other. RuntimeError when the round ends: nothing is uploaded here."""
        for _ in range(steps):
            forward, backward = self._recording.steps[self.step % len(self._recording.steps)]
            self._ask(self._recording.before_s, replace(forward, step=self.step), m.StepHidden)
            grad = self._ask(self._recording.between_s, replace(backward, step=self.step), m.StepGrad)
            if grad.round_closes:
                raise RuntimeError("the hub's --round-steps are too few to be replayed")
            self.step += 1

    def _ask(self, work_s: float, message: m.AnyMessage, answer: type[Any]) -> Any:
        time.sleep(work_s + self._half_s)
        reply = self._client.ask(message, answer)
        time.sleep(self._half_s)
        return reply

    def leave(self) -> None:
        """Out of the cohort; `enter` comes back."""
        self._client.ask(m.Leave(0, "enough"), m.Bye)

    def close(self) -> None:
        """End the network thread."""
        self._connection.close()


class Crowd:
    """Replayed edges in this process, `count` of them, a thread and a client each."""

    def __init__(self, join: str, folder: Path, count: int, recording: Recording, link_s: float) -> None:
        self.edges = [ReplayedEdge(join, folder / f"edge-{number}", recording, link_s) for number in range(count)]
        self._threads = ThreadPoolExecutor(count)

    def in_turn(self, steps: int) -> list[float]:
        """Each edge takes its steps while no other is there; the seconds of each."""
        seconds = []
        for one in self.edges:
            one.enter()
            started = time.perf_counter()
            one.take(steps)
            seconds.append(time.perf_counter() - started)
            one.leave()
        return seconds

    def joined(self, count: int, steps: int) -> float:
        """`count` edges take their steps together; seconds until the last is done."""
        edges = self.edges[:count]
        for one in edges:
            one.enter()
        started = time.perf_counter()
        list(self._threads.map(lambda one: one.take(steps), edges))
        seconds = time.perf_counter() - started
        for one in edges:
            one.leave()
        return seconds

    def close(self) -> None:
        """End all of them."""
        self._threads.shutdown()
        for one in self.edges:
            one.close()


def gather(join: str, folder: str, recording: str, count: int, link_s: float) -> Crowd:
    """A crowd by a recording on the disk."""
    return Crowd(join, Path(folder), count, Recording.read(Path(recording)), link_s)
