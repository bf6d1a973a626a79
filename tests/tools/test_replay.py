"""Edges that are replayed: what is recorded, and that a hub takes them for real ones."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import messaging.messages as m
from blocks.codec import to_wire
from blocks.layout import Layout
from edge.pipeline import Times
from messaging.errors import LinkLost, NotFinite
from tools.bench import client_batch, replay
from tools.bench.client_batch import PAPER, Turn
from tools.bench.hub_part import HubPart
from tools.bench.models import Models
from tools.bench.replay import Crowd, Recording, Step, Work
from tools.programs import Programs

ROWS, WIDTH, HIDDEN = 2, 8, 64


WORK = Work(0.01, 0.02, 0.005, 0.015)


def a_step(number: int, micros: int = 1) -> Step:
    return tuple(a_part(number, micro, micros) for micro in range(micros))


def a_part(number: int, micro: int, micros: int) -> tuple[m.StepForward, m.StepBackward]:
    states = torch.randn(2, ROWS, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(10 * number + micro))
    layout, tokens = Layout(ROWS, 0, WIDTH).to_ints(), ROWS * (WIDTH - 1)
    forward = m.StepForward(number, tokens, layout, to_wire(states[0]), micro, micros)
    return forward, m.StepBackward(number, to_wire(states[1]), micro)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Models(tmp_path_factory.mktemp("models")).small


def data_of(tensor: m.Tensor) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor.chunks)


# -- what is recorded -------------------------------------------------------------------------------------


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    recording = Recording((a_step(5, 2), a_step(6, 2)), WORK)
    recording.write(tmp_path / "recording")
    again = Recording.read(tmp_path / "recording")
    assert again.work == WORK
    assert [[(f.step, f.micro, b.step, b.micro) for f, b in step] for step in again.steps] == [
        [(5, 0, 5, 0), (5, 1, 5, 1)],
        [(6, 0, 6, 0), (6, 1, 6, 1)],
    ]
    assert again.steps[1][1][0].layout == recording.steps[1][1][0].layout
    for at in (0, 1):
        assert data_of(again.steps[0][at][0].smashed) == data_of(recording.steps[0][at][0].smashed)
        assert data_of(again.steps[1][at][1].grad_hidden) == data_of(recording.steps[1][at][1].grad_hidden)


def test_an_edges_part_of_a_step_is_that_of_all_its_micro_batches() -> None:
    assert Recording((a_step(0, 4),), WORK).edge_s == pytest.approx(0.015 + 4 * 0.035)
    assert Recording((a_step(0, 4),), WORK).lead_s == pytest.approx(0.005 + 0.015 + 0.01)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the recorder reads the time from: the first entry."""
    now = [0.0]
    monkeypatch.setattr(replay.time, "perf_counter", lambda: now[0])
    return now


def answered() -> Future[m.AnyMessage]:
    future: Future[m.AnyMessage] = Future()
    future.set_result(m.Bye())
    return future


def test_the_edges_own_seconds_are_all_but_its_waiting(clock: list[float]) -> None:
    recorder = replay._Recorder()
    for number in range(5):
        # Micro-batches may be answered in any order.
        for message in (one for part in reversed(a_step(number, 2)) for one in part):
            recorder.note(message, answered())
        slow = 1 if number in (0, 1) else 0
        clock[0] += 40.0 + 100 * slow
        recorder.ended(Times(blocks_a=4.0 + slow, blocks_c=10.0 + slow, backward_a=2.0 + slow, waiting=21.0))
    recording = recorder.recording()
    # Of one micro-batch; the rest is 40 - 21 - 16.
    assert recording.work == Work(2.0, 5.0, 1.0, 3.0)
    # The first steps do not count.
    assert [[(f.step, f.micro) for f, _ in step] for step in recording.steps] == [
        [(number, 0), (number, 1)] for number in (2, 3, 4)
    ]


def test_what_is_no_step_or_failed_is_not_recorded() -> None:
    recorder = replay._Recorder()
    recorder.note(m.AwaitRound(0), answered())
    lost: Future[m.AnyMessage] = Future()
    lost.set_exception(LinkLost("gone"))
    recorder.note(a_step(0)[0][0], lost)
    assert recorder._asked == {}


# -- replayed edges at a hub --------------------------------------------------------------------------------


def test_edges_in_turn_take_a_step_of_the_hub_each_and_joined_ones_share_one(
    programs: Programs, model: Path, tmp_path: Path
) -> None:
    hub = programs.serve("--model", model, "--round-steps", 10)
    recordings = {"whole": Recording((a_step(0), a_step(1)), WORK), "parts": Recording((a_step(0, 2),), WORK)}
    crowd = Crowd(hub.join, tmp_path, 3, recordings, link_s=0.04)
    try:
        # Edge and link are waits: 0.05 s, and the link twice.
        assert min(crowd.in_turn("whole", 3, steps=2)) >= 2 * 0.13
        hub.until(lambda live: live["hub_step"] == 6, "a step for each step of an edge")
        # Work of 0.085 s for two micro-batches, and the link at least once to begin with and once to end.
        assert crowd.joined("parts", 3, steps=2) >= 2 * 0.125
        hub.until(lambda live: live["hub_step"] == 8, "joined steps")
        assert [one.step for one in crowd.edges] == [4, 4, 4]
        assert crowd.joined("whole", 1, steps=1) >= 0.13
        # Nothing is uploaded, so no round may end.
        with pytest.raises(RuntimeError, match="--round-steps"):
            crowd.joined("whole", 1, steps=1)
    finally:
        crowd.close()


class Answering:
    """A client whose hub answers after `hub_s` seconds, one request at a time."""

    def __init__(self, hub_s: float) -> None:
        self._hub_s = hub_s
        self._one = ThreadPoolExecutor(1)
        self.asked: list[tuple[type, int]] = []

    def submit(self, message: m.AnyMessage) -> Future[m.AnyMessage]:
        assert isinstance(message, m.StepForward | m.StepBackward)
        self.asked.append((type(message), message.micro))
        return self._one.submit(self._answer, message)

    def _answer(self, message: m.StepForward | m.StepBackward) -> m.AnyMessage:
        time.sleep(self._hub_s)
        if isinstance(message, m.StepForward):
            return m.StepHidden(message.step, message.smashed, message.micro)
        return m.StepGrad(message.step, 0, 0, 0, message.grad_hidden, message.micro)


class Failing(Answering):
    def _answer(self, message: m.StepForward | m.StepBackward) -> m.AnyMessage:
        raise LinkLost("gone")


def an_edge(client: Answering, link_s: float) -> replay.ReplayedEdge:
    one = replay.ReplayedEdge.__new__(replay.ReplayedEdge)
    one.step, one._line = 0, replay._Line(client, link_s / 2)  # type: ignore[arg-type]
    return one


def test_micro_batches_overlap_with_link_and_hub_but_an_edge_does_one_thing_at_a_time() -> None:
    times = []
    for _ in range(3):
        client, began = Answering(0.05), time.perf_counter()
        one = an_edge(client, 0.2)
        one.take(Recording((a_step(0, 4),), Work(0.01, 0.05, 0.01, 0.02)), 1)
        times.append(time.perf_counter() - began)
        one._line.close()
        for kind in (m.StepForward, m.StepBackward):
            assert [micro for asked, micro in client.asked if asked is kind] == [0, 1, 2, 3]
    # Its own work is 0.3 s; with everything one after the other each of them would take 2.3 s.
    assert 0.3 + 0.2 <= min(times) < 1.8


def test_a_failed_request_ends_the_replay() -> None:
    one = an_edge(Failing(0.0), 0.0)
    with pytest.raises(LinkLost):
        one.take(Recording((a_step(0),), WORK), 1)
    one._line.close()


def test_the_hubs_part_is_the_engine_on_the_same_bytes(model: Path) -> None:
    part = HubPart(model, Recording((a_step(0, 2), a_step(1, 2)), WORK))
    assert part.step(1) > 0
    assert part.step(3) > 0
    # A forward for each micro-batch.
    assert (part._engine.optimizer.steps, part._engine.forwards) == (2, 4)


def test_a_step_that_the_engine_refuses_is_no_measurement(model: Path) -> None:
    ((forward, backward),) = a_step(0)
    bad = m.StepBackward(0, to_wire(torch.full((ROWS, WIDTH, HIDDEN), float("nan"))))
    assert backward.step == bad.step
    with pytest.raises(NotFinite):
        HubPart(model, Recording((((forward, bad),),), WORK)).step(1)


# -- the figures --------------------------------------------------------------------------------------------


def turn_of(hub_1: float, around: float, engine: dict[int, float], overhead: float) -> Turn:
    """A turn whose joined steps take `overhead` longer than their parts."""
    joined = {count: around + engine[count] + overhead for count in PAPER}
    return Turn([around + hub_1] * max(PAPER), [around + hub_1] * 2, joined, engine)


def test_the_bound_is_reached_where_the_hub_adds_nothing_to_its_engine() -> None:
    engine = {1: 1.0, 2: 1.9, 4: 3.7, 8: 7.0}
    turn = turn_of(1.05, 0.6, engine, 0.0)
    assert client_batch.bound(8, 0.6, turn) == pytest.approx(8 * 1.65 / 7.6)
    for count in PAPER:
        assert sum(turn.alone[:count]) / turn.joined[count] == pytest.approx(client_batch.bound(count, 0.6, turn))


def test_joining_that_costs_more_than_it_saves_does_not_lower_the_bound() -> None:
    turn = turn_of(1.0, 0.6, {1: 1.0, 2: 3.0, 4: 6.0, 8: 12.0}, 0.0)
    assert client_batch.bound(4, 0.6, turn) == pytest.approx(4 * 1.6 / 4.6)
    assert sum(turn.alone[:4]) / turn.joined[4] < client_batch.bound(4, 0.6, turn)
