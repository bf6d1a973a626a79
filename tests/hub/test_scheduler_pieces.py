"""Requests of many positions are computed in pieces, so that nobody's next token waits for somebody's whole prompt."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import State
from messaging.errors import ErrorCode, HubError


@pytest.fixture
def hub() -> Scheduler:
    """Another session, 20, generates."""
    return Scheduler(State(2, 20, 0, chunk=100, recent=(frozenset({20}), frozenset({20}))))


def play(scheduler: Scheduler, rows: Sequence[tuple[ev.Event, Sequence[act.Action]]]) -> None:
    """Feed each row's event; its actions, but for notes, must be the row's."""
    for number, (event, wanted) in enumerate(rows):
        assert [a for a in scheduler.handle(event) if not isinstance(a, act.Note)] == list(wanted), f"row {number}"


def wide(session: int, columns: int, rows: int = 1, request: int = 1) -> ev.Event:
    return ev.InferReceived(session, request, f"w{session}", rows, columns)


def narrow(session: int) -> ev.Event:
    return ev.InferReceived(session, 1, f"n{session}")


def run(*payloads: str, upto: int | None = None) -> act.Action:
    requests = tuple((int(payload[1:]), 1, payload) for payload in payloads)
    return act.RunInfer(requests, {} if upto is None else {requests[0][:2]: upto})


def done(*sessions: int) -> ev.Event:
    return ev.InferDone(tuple((session, 1, "X") for session in sessions))


def answers(*sessions: int) -> list[act.Action]:
    return [act.AnswerInfer(session, 1, "X") for session in sessions]


def test_a_prompt_goes_in_pieces_and_whoever_waits_goes_between_them(hub: Scheduler) -> None:
    """All of them: they are not halved, as their edges had the time of a piece."""
    play(hub, [
        (wide(8, columns=120, rows=2), [run("w8", upto=50)]),
        (narrow(9), []),
        (wide(7, columns=101), []),
        (wide(6, columns=100), []),
        (done(), [run("n9", "w6")]),
        (narrow(9), []),
        (done(9, 6), [*answers(9, 6), run("w8", upto=100)]),
        (done(), [run("n9")]),
        (done(9), [*answers(9), run("w8", upto=120)]),
        (narrow(1), []), (narrow(2), []), (narrow(3), []), (narrow(4), []), (narrow(5), []),
        (done(8), [*answers(8), run("n1", "n2", "n3", "n4", "n5")]),
        (done(1, 2, 3, 4, 5), [*answers(1, 2, 3, 4, 5), run("w7", upto=100)]),
        (done(), [run("w7", upto=101)]),
        (done(7), answers(7)),
    ])  # fmt: skip
    assert (hub.state.wide, hub.state.parted, hub.state.infers) == ({}, None, [])


def test_a_session_that_generates_alone_has_larger_pieces(hub: Scheduler) -> None:
    hub.state.recent = ()
    play(hub, [
        (wide(8, columns=1500, rows=2), [run("w8", upto=200)]),
        (done(), [run("w8", upto=400)]),
        (narrow(9), []),
        (done(), [run("n9")]),
        (done(9), [*answers(9), run("w8", upto=450)]),
        (done(), [run("w8", upto=500)]),
        (done(), [run("w8", upto=700)]),
    ])  # fmt: skip


def test_a_request_that_fails_is_not_gone_on_with(hub: Scheduler) -> None:
    error = HubError(ErrorCode.KV_FULL, "full")
    play(hub, [
        (wide(8, columns=300), [run("w8", upto=100)]),
        (ev.InferDone(((8, 1, error),)), [act.AnswerInfer(8, 1, error)]),
    ])  # fmt: skip
    assert (hub.state.wide, hub.state.parted, hub.state.infers) == ({}, None, [])


@pytest.mark.parametrize("event", [ev.EdgeGone(8), ev.EdgeRestarted(8)])
def test_a_request_whose_process_is_gone_is_not_gone_on_with(hub: Scheduler, event: ev.Event) -> None:
    play(hub, [
        (wide(8, columns=300), [run("w8", upto=100)]),
        (event, []),
        (done(), [act.FreeStreams(((8, 0),))]),
        (ev.HousekeepingDone(), []),
    ])  # fmt: skip
    assert (hub.state.wide, hub.state.parted, hub.state.infers) == ({}, None, [])


def test_the_next_process_of_an_edge_begins_at_the_first_column(hub: Scheduler) -> None:
    """Also if it numbers its request as the process before it did."""
    play(hub, [
        (wide(8, columns=300), [run("w8", upto=100)]),
        (ev.EdgeRestarted(8), []),
        (wide(8, columns=250), []),
        (done(), [act.FreeStreams(((8, 0),))]),
        (ev.HousekeepingDone(), [run("w8", upto=100)]),
        (done(), [run("w8", upto=250)]),
    ])  # fmt: skip


def test_training_goes_on_when_a_prompt_is_whole(hub: Scheduler) -> None:
    """Not between its pieces: the prompt would wait for a step at each. And not later."""
    forward = act.RunForward(((1, "s1"), (2, "s2")))
    play(hub, [
        (ev.EdgeJoined(1, "one", True), []),
        (ev.EdgeJoined(2, "two", True), []),
        (wide(8, columns=200), [run("w8", upto=100)]),
        (ev.SmashedReceived(1, 5, 0, "s1"), []),
        (ev.SmashedReceived(2, 5, 0, "s2"), []),
        (narrow(9), []),
        (done(), [run("n9")]),
        (wide(7, columns=200), []),
        (done(9), [*answers(9), run("w8", upto=200)]),
        (done(8), [*answers(8), forward]),
    ])  # fmt: skip
