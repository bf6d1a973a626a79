"""Edges without a model: they send what a real edge sent, and wait as long as it worked.

A recording holds some steps of a real `edge join`, as it asked for them on the wire, and the seconds of its own work:
Blocks A forward, Blocks C with the loss, and the backward of A of each micro-batch, and the rest of a step (optimizer,
data). A replayed edge enrols, opens a training session and asks the same through
`HubClient`, over real sockets, doing next what is ready as `edge.pipeline` does. So any number of edges take the core
of one and little of that, each as fast as if it had a machine of its own, and what is measured is the hub.

The link is added waits (`_Line`): half of the round trip until a request leaves, and half after each answer. They are
exact, and ask no relay to compete for the edges' core; what they leave out is the link's bandwidth.
"""

from __future__ import annotations

import contextlib
import heapq
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]

import edge.connection
import messaging.messages as m
from blocks.partition import Partition
from edge.client import HubClient
from edge.connection import SOFTWARE, Connection
from edge.pipeline import Taken, Times
from edge.state import EdgeState
from edge.trainer import Trainer
from messaging.console import Journal
from messaging.framing import decode, encode

PARTITION = Partition(1, 1)
#: Steps of the real edge that do not count: caches and allocators are cold.
_WARM = 2

#: The forward and the backward of each micro-batch of a step.
Step = tuple[tuple[m.StepForward, m.StepBackward], ...]


@dataclass(frozen=True)
class Work:
    """Seconds of an edge's own work: Blocks A, C, and A backward of one micro-batch; the rest once a step."""

    blocks_a: float
    blocks_c: float
    backward_a: float
    rest: float


@dataclass(frozen=True)
class Recording:
    """Steps as they were asked for, and medians of the edge's own seconds."""

    steps: tuple[Step, ...]
    work: Work

    @property
    def edge_s(self) -> float:
        """The edge's own part of a step."""
        work = self.work
        return work.rest + len(self.steps[0]) * (work.blocks_a + work.blocks_c + work.backward_a)

    @property
    def lead_s(self) -> float:
        """What an edge has to do between the hub's last answer of a step and its first request of the next one."""
        return self.work.backward_a + self.work.rest + self.work.blocks_a

    def write(self, path: Path) -> None:
        """As the wire's own frames."""
        steps = [[[_encoded(asked) for asked in part] for part in step] for step in self.steps]
        path.write_bytes(msgpack.packb([list(vars(self.work).values()), steps]))

    @classmethod
    def read(cls, path: Path) -> Recording:
        """What `write` wrote."""
        work, steps = msgpack.unpackb(path.read_bytes())
        return cls(tuple(tuple((_decoded(f), _decoded(b)) for f, b in step) for step in steps), Work(*work))


def _encoded(message: m.AnyMessage) -> list[bytes]:
    return [bytes(frame) for frame in encode(m.Packet(message))]


def _decoded(frames: list[bytes]) -> Any:
    return decode(frames, m.TO_HUB).message


# --- recording ---------------------------------------------------------------------------------------


class _Recorder:
    """Notes what a training edge asks for, and at the end of each step when that was and where its time went."""

    def __init__(self) -> None:
        self._asked: dict[tuple[int, int, type], list[bytes]] = {}
        self._ends: list[tuple[float, Times]] = []

    def note(self, message: m.AnyMessage, answer: Future[m.AnyMessage]) -> None:
        """A request was answered."""
        if isinstance(message, m.StepForward | m.StepBackward) and answer.exception() is None:
            self._asked[message.step, message.micro, type(message)] = _encoded(message)

    def ended(self, times: Times) -> None:
        """A step is over."""
        self._ends.append((time.perf_counter(), times))

    def recording(self) -> Recording:
        """What was noted, but for the first steps."""
        numbers = sorted({step for step, _, _ in self._asked})[_WARM:]
        steps = tuple(self._step(number) for number in numbers)
        micros, ends = len(steps[0]), self._ends[_WARM - 1 :]
        rest = [
            end - before - t.waiting - t.blocks_a - t.blocks_c - t.backward_a
            for (before, _), (end, t) in pairwise(ends)
        ]
        blocks_a, blocks_c, backward_a = (
            statistics.median(getattr(times, name) for _, times in ends[1:]) / micros
            for name in ("blocks_a", "blocks_c", "backward_a")
        )
        return Recording(steps, Work(blocks_a, blocks_c, backward_a, statistics.median(rest)))

    def _step(self, number: int) -> Step:
        micros = sorted({micro for step, micro, _ in self._asked if step == number})
        kinds = (m.StepForward, m.StepBackward)
        forwards_and_backwards = [[_decoded(self._asked[number, at, kind]) for kind in kinds] for at in micros]
        return tuple((forward, backward) for forward, backward in forwards_and_backwards)


def record(join: str, state: str, model: str, data: str, steps: int, out: str, micros: int) -> None:
    """Train by `edge join`, `steps` steps of 4 x 128 after some that do not count; write the recording to `out`."""
    from tools.bench import training

    recorder = _Recorder()
    with _recorded(recorder):
        training.train(join, state, model, data, steps + _WARM, micros)
    recorder.recording().write(Path(out))


@contextlib.contextmanager
def _recorded(recorder: _Recorder) -> Iterator[None]:
    account = Trainer._account

    class Client(HubClient):
        def submit(self, message: m.AnyMessage, deadline_s: float = float("inf")) -> Future[m.AnyMessage]:
            answer = super().submit(message, deadline_s)
            answer.add_done_callback(partial(recorder.note, message))
            return answer

    def noted(self: Trainer, started: float, tokens: int, taken: Taken) -> None:
        recorder.ended(taken.times)
        account(self, started, tokens, taken)

    edge.connection.HubClient = Client  # type: ignore[misc]
    Trainer._account = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        edge.connection.HubClient = HubClient  # type: ignore[misc]
        Trainer._account = account  # type: ignore[method-assign]


# --- replaying ---------------------------------------------------------------------------------------


class _Line:
    """A link of `half_s` seconds each way between an edge and its client; what crosses it waits for nothing else."""

    def __init__(self, client: HubClient, half_s: float) -> None:
        self._client = client
        self._half_s = half_s
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = count()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def submit(self, message: m.AnyMessage) -> Future[m.AnyMessage]:
        """Ask; the answer is there when it has crossed the link."""
        here: Future[m.AnyMessage] = Future()

        def leave() -> None:
            try:
                there = self._client.submit(message)
            except Exception as error:
                here.set_exception(error)
            else:
                there.add_done_callback(lambda there: self._later(partial(_settle, here, there)))

        self._later(leave)
        return here

    def close(self) -> None:
        """End its thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _later(self, what: Callable[[], object]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + self._half_s, next(self._numbers), what))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    return
                now = time.monotonic()
                if not self._due or self._due[0][0] > now:
                    self._changed.wait(self._due[0][0] - now if self._due else None)
                    continue
                _, _, what = heapq.heappop(self._due)
            what()


def _settle(here: Future[m.AnyMessage], there: Future[m.AnyMessage]) -> None:
    error = there.exception()
    if error is not None:
        here.set_exception(error)
    else:
        here.set_result(there.result())


class ReplayedEdge:
    """One edge, enrolled with `join` under a state folder of its own. `link_s`: the round trip."""

    def __init__(self, join: str, state: Path, link_s: float) -> None:
        self._connection = Connection(EdgeState(state), Journal(), join, state.name)
        self._client = self._connection.client
        self._line = _Line(self._client, link_s / 2)
        #: steps that the hub has of this edge
        self.step = 0

    def enter(self) -> None:
        """Open a training session: from here on the hub waits for this edge's steps."""
        asked = m.Describe(m.PROTOCOL_VERSION, m.PROTOCOL_VERSION, SOFTWARE)
        welcome = self._connection.hello(PARTITION, True, self._client.ask(asked, m.Description))
        self.step = welcome.applied

    def take(self, recording: Recording, steps: int) -> None:
        """So many steps, one after the other. RuntimeError when the round ends: nothing is uploaded here."""
        for _ in range(steps):
            if self._step(recording.steps[self.step % len(recording.steps)], recording.work).round_closes:
                raise RuntimeError("the hub's --round-steps are too few to be replayed")
            self.step += 1

    def _step(self, parts: Step, work: Work) -> m.StepGrad:
        """The micro-batches of a step, whatever is ready next: in the order of `edge.pipeline`."""
        time.sleep(work.rest)
        hiddens: list[Future[m.AnyMessage]] = []
        grads: list[Future[m.AnyMessage]] = []
        done = 0
        while done < len(parts):
            if len(hiddens) < len(parts):
                time.sleep(work.blocks_a)
                hiddens.append(self._line.submit(replace(parts[len(hiddens)][0], step=self.step)))
            elif len(grads) < len(parts) and hiddens[len(grads)].done():
                hiddens[len(grads)].result()
                time.sleep(work.blocks_c)
                grads.append(self._line.submit(replace(parts[len(grads)][1], step=self.step)))
            elif done < len(grads) and grads[done].done():
                reply = grads[done].result()
                time.sleep(work.backward_a)
                done += 1
            else:
                wait([*hiddens[len(grads) :][:1], *grads[done:][:1]], return_when=FIRST_COMPLETED)
        assert isinstance(reply, m.StepGrad)
        return reply

    def leave(self) -> None:
        """Out of the cohort; `enter` comes back."""
        self._client.ask(m.Leave(0, "enough"), m.Bye)

    def close(self) -> None:
        """End its threads."""
        self._connection.close()
        self._line.close()


class Crowd:
    """Replayed edges in this process, `count` of them, with threads and a client each; `recordings` by name."""

    def __init__(self, join: str, folder: Path, count: int, recordings: dict[str, Recording], link_s: float) -> None:
        self.edges = [ReplayedEdge(join, folder / f"edge-{number}", link_s) for number in range(count)]
        self._recordings = recordings
        self._threads = ThreadPoolExecutor(count)

    def in_turn(self, name: str, count: int, steps: int) -> list[float]:
        """Each of `count` edges takes its steps of a recording while no other is there; the seconds of each."""
        seconds = []
        for one in self.edges[:count]:
            one.enter()
            started = time.perf_counter()
            one.take(self._recordings[name], steps)
            seconds.append(time.perf_counter() - started)
            one.leave()
        return seconds

    def joined(self, name: str, count: int, steps: int) -> float:
        """`count` edges take their steps of a recording together; seconds until the last is done."""
        edges = self.edges[:count]
        for one in edges:
            one.enter()
        started = time.perf_counter()
        list(self._threads.map(lambda one: one.take(self._recordings[name], steps), edges))
        seconds = time.perf_counter() - started
        for one in edges:
            one.leave()
        return seconds

    def close(self) -> None:
        """End all of them."""
        self._threads.shutdown()
        for one in self.edges:
            one.close()


def gather(join: str, folder: str, recordings: dict[str, str], count: int, link_s: float) -> Crowd:
    """A crowd by recordings on the disk."""
    read = {name: Recording.read(Path(path)) for name, path in recordings.items()}
    return Crowd(join, Path(folder), count, read, link_s)
