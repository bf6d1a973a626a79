"""Edges that are replayed: what is recorded, and that a hub takes them for real ones."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

import messaging.messages as m
from blocks.codec import to_wire
from blocks.layout import Layout
from messaging.errors import LinkLost, NotFinite
from tools.bench import client_batch, replay
from tools.bench.client_batch import PAPER, Turn
from tools.bench.hub_part import HubPart
from tools.bench.models import Models
from tools.bench.replay import Crowd, Recording
from tools.programs import Programs

ROWS, WIDTH, HIDDEN = 2, 8, 64


def a_step(number: int) -> tuple[m.StepForward, m.StepBackward]:
    states = torch.randn(2, ROWS, WIDTH, HIDDEN, generator=torch.Generator().manual_seed(number))
    forward = m.StepForward(number, ROWS * (WIDTH - 1), Layout(ROWS, 0, WIDTH).to_ints(), to_wire(states[0]))
    return forward, m.StepBackward(number, to_wire(states[1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Models(tmp_path_factory.mktemp("models")).small


def data_of(tensor: m.Tensor) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor.chunks)


# -- what is recorded -------------------------------------------------------------------------------------


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    recording = Recording((a_step(5), a_step(6)), 0.25, 0.5)
    recording.write(tmp_path / "recording")
    again = Recording.read(tmp_path / "recording")
    assert (again.before_s, again.between_s, again.edge_s) == (0.25, 0.5, 0.75)
    assert [step[0].step for step in again.steps] == [5, 6]
    assert again.steps[1][0].layout == recording.steps[1][0].layout
    assert data_of(again.steps[0][0].smashed) == data_of(recording.steps[0][0].smashed)
    assert data_of(again.steps[1][1].grad_hidden) == data_of(recording.steps[1][1].grad_hidden)


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


def test_the_edges_own_seconds_are_those_between_an_answer_and_the_next_request(clock: list[float]) -> None:
    recorder, at = replay._Recorder(), 0.0
    for number in range(5):
        # 3 s before the forward, 10 s at the hub, 2 s in between, 20 s at the hub.
        for message, work, hub in zip(a_step(number), (3.0, 2.0), (10.0, 20.0), strict=True):
            asked_at, at = at + work, at + work + hub
            clock[0] = at
            recorder.note(message, asked_at, answered())
    recording = recorder.recording()
    assert (recording.before_s, recording.between_s) == (3.0, 2.0)
    # The first steps do not count.
    assert [forward.step for forward, _ in recording.steps] == [2, 3, 4]


@pytest.mark.usefixtures("clock")
def test_what_is_no_step_or_failed_is_not_recorded() -> None:
    recorder = replay._Recorder()
    recorder.note(m.AwaitRound(0), 0.0, answered())
    lost: Future[m.AnyMessage] = Future()
    lost.set_exception(LinkLost("gone"))
    recorder.note(a_step(0)[0], 0.0, lost)
    assert recorder.asked == []


@pytest.mark.usefixtures("clock")
def test_an_edge_with_two_forwards_under_way_cannot_be_recorded() -> None:
    recorder = replay._Recorder()
    (first, grad), (second, _) = a_step(0), a_step(1)
    for message in (first, second, grad, a_step(1)[1]):
        recorder.note(message, 0.0, answered())
    with pytest.raises(ValueError, match="one step after the other"):
        recorder.recording()


# -- replayed edges at a hub --------------------------------------------------------------------------------


def test_edges_in_turn_take_a_step_of_the_hub_each_and_joined_ones_share_one(
    programs: Programs, model: Path, tmp_path: Path
) -> None:
    hub = programs.serve("--model", model, "--round-steps", 10)
    crowd = Crowd(hub.join, tmp_path, 3, Recording((a_step(0), a_step(1)), 0.03, 0.02), link_s=0.04)
    try:
        # Edge and link are waits: 0.05 s, and the link twice.
        assert min(crowd.in_turn(steps=2)) >= 2 * 0.13
        hub.until(lambda live: live["hub_step"] == 6, "a step for each step of an edge")
        assert crowd.joined(3, steps=2) >= 2 * 0.13
        hub.until(lambda live: live["hub_step"] == 8, "joined steps")
        assert [one.step for one in crowd.edges] == [4, 4, 4]
        assert crowd.joined(1, steps=1) >= 0.13
        # Nothing is uploaded, so no round may end.
        with pytest.raises(RuntimeError, match="--round-steps"):
            crowd.joined(1, steps=1)
    finally:
        crowd.close()


def test_the_hubs_part_is_the_engine_on_the_same_bytes(model: Path) -> None:
    part = HubPart(model, Recording((a_step(0), a_step(1)), 0.0, 0.0))
    assert part.step(1) > 0
    assert part.step(3) > 0
    assert (part._engine.optimizer.steps, part._engine.forwards) == (2, 2)


def test_a_step_that_the_engine_refuses_is_no_measurement(model: Path) -> None:
    forward, backward = a_step(0)
    bad = m.StepBackward(0, to_wire(torch.full((ROWS, WIDTH, HIDDEN), float("nan"))))
    assert backward.step == bad.step
    with pytest.raises(NotFinite):
        HubPart(model, Recording(((forward, bad),), 0.0, 0.0)).step(1)


# -- the figures --------------------------------------------------------------------------------------------


def turn_of(hub_1: float, around: float, engine: dict[int, float], overhead: float) -> Turn:
    """A turn whose joined steps take `overhead` longer than their parts."""
    joined = {count: around + engine[count] + overhead for count in PAPER}
    return Turn([around + hub_1] * max(PAPER), joined, engine)


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
