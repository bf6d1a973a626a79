"""The hub's decisions: events in, actions out, by tables. Any order of events: `test_scheduler_machine.py`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Phase, State
from messaging.errors import ErrorCode, NotFinite

Row = tuple[ev.Event, list[act.Action]]

# Requests are numbered by session and step: session 1 asks forward 110 and backward 111 for its step 1.


def forward_id(session: int, step: int) -> int:
    return 100 * session + 10 * step


def joined(session: int, name: str | None = None, applied: int = 0) -> ev.Event:
    return ev.EdgeJoined(session, name or f"edge{session}", True, applied)


def smashed(session: int, step: int = 0) -> ev.Event:
    return ev.SmashedReceived(session, forward_id(session, step), step, f"s{session}.{step}")


def gradient(session: int, step: int = 0) -> ev.Event:
    return ev.GradientReceived(session, forward_id(session, step) + 1, step, f"g{session}.{step}")


def run_forward(*sessions: int, step: int = 0) -> act.Action:
    return act.RunForward(tuple((s, f"s{s}.{step}") for s in sessions))


def run_backward(*sessions: int, step: int = 0) -> act.Action:
    return act.RunBackward({s: f"g{s}.{step}" for s in sessions})


def forward_done(*sessions: int) -> ev.Event:
    return ev.ForwardDone({s: f"h{s}" for s in sessions})


def backward_done(*sessions: int) -> ev.Event:
    return ev.BackwardDone({s: f"d{s}" for s in sessions})


def applied_after(sessions: tuple[int, ...], answers: list[object]) -> list[tuple[ev.Event, Sequence[object]]]:
    """The backward of all these is done, then the optimizer has stepped; `answers` come then."""
    return [(backward_done(*sessions), [act.ApplyStep(sessions)]), (ev.StepApplied(sessions), answers)]


def hidden(session: int, step: int = 0) -> act.Action:
    return act.AnswerForward(session, forward_id(session, step), step, f"h{session}")


def grad(session: int, step: int = 0, hub_step: int = 1, closes: bool = False) -> act.Action:
    return act.AnswerBackward(session, forward_id(session, step) + 1, step, f"d{session}", hub_step, closes)


def published(session: int, version: int, round_: int, over: bool = False) -> act.Action:
    return act.AnswerRound(session, 900 + session, version, round_, over)


def awaited(session: int, round_: int = 0) -> ev.Event:
    return ev.RoundAwaited(session, 900 + session, round_)


def uploaded(session: int, round_: int = 0) -> ev.Event:
    return ev.AdapterUploaded(session, round_, f"a{session}")


def close_round(round_: int, *sessions: int) -> act.Action:
    return act.CloseRound(round_, round_ + 1, tuple(f"a{s}" for s in sessions))


def refused(session: int, request: int, code: ErrorCode) -> tuple[int, int, ErrorCode]:
    return (session, request, code)


def play(scheduler: Scheduler, rows: Sequence[tuple[ev.Event, Sequence[object]]]) -> None:
    """Feed each row's event; its actions, but for notes and the wording of refusals, must be the row's."""
    for number, (event, wanted) in enumerate(rows):
        actions = [a for a in scheduler.handle(event) if not isinstance(a, act.Note)]
        given_ = [(a.session, a.request, a.code) if isinstance(a, act.Refuse) else a for a in actions]
        assert given_ == list(wanted), f"row {number}: {event}"


def scheduler(cohort: int = 2, round_steps: int = 20, rounds: int = 0) -> Scheduler:
    return Scheduler(State(cohort, round_steps, rounds))


#: Two edges in the middle of a joined forward.
FORWARD_OF_TWO: list[tuple[ev.Event, list[act.Action]]] = [
    (joined(1), []),
    (joined(2), []),
    (smashed(1), []),
    (smashed(2), [run_forward(1, 2)]),
]
#: The same two when both have their hidden states.
HIDDEN_OF_TWO = [*FORWARD_OF_TWO, (forward_done(1, 2), [hidden(1), hidden(2)])]
#: The same two after their first step.
STEP_OF_TWO = [
    *HIDDEN_OF_TWO,
    (gradient(2), []),
    (gradient(1), [run_backward(1, 2)]),
    *applied_after((1, 2), [grad(1), grad(2)]),
]

SCENARIOS: dict[str, list[tuple[ev.Event, Sequence[object]]]] = {
    "a cohort gathers before its first step": [
        (joined(1), []),
        (smashed(1), []),
        (joined(2), []),
        (smashed(2), [run_forward(1, 2)]),
    ],
    "rows go by name, whoever comes first": [
        (joined(1, "zoe"), []),
        (joined(2, "amy"), []),
        (smashed(1), []),
        (smashed(2), [run_forward(2, 1)]),
    ],
    "a joined step, gradients in any order": [
        *STEP_OF_TWO,
        (smashed(2, 1), []),
        (smashed(1, 1), [run_forward(1, 2, step=1)]),
    ],
    "an edge that joins late waits for the step under way": [
        *FORWARD_OF_TWO,
        (joined(3, "aaa"), []),
        (smashed(3), []),
        (forward_done(1, 2), [hidden(1), hidden(2)]),
        (gradient(1), []),
        (gradient(2), [run_backward(1, 2)]),
        *applied_after((1, 2), [grad(1), grad(2)]),
        (smashed(1, 1), []),
        (smashed(2, 1), [act.RunForward(((3, "s3.0"), (1, "s1.1"), (2, "s2.1")))]),
    ],
    "an edge that leaves in the middle of the forward counts nothing": [
        *FORWARD_OF_TWO,
        (ev.EdgeLeft(2, False), []),
        (forward_done(1, 2), [hidden(1), hidden(2)]),
        (gradient(1), [run_backward(1)]),
        *applied_after((1,), [grad(1)]),
        (smashed(1, 1), [run_forward(1, step=1)]),
    ],
    "an edge that leaves in the middle of the backward is in this step and no other": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (gradient(2), [run_backward(1, 2)]),
        (ev.EdgeLeft(2, False), []),
        *applied_after((1, 2), [grad(1), grad(2)]),
        (smashed(1, 1), [run_forward(1, step=1)]),
    ],
    "an edge that leaves with a request waiting is answered": [
        *HIDDEN_OF_TWO,
        (smashed(2, 1), []),
        (ev.EdgeLeft(2, False), [refused(2, forward_id(2, 1), ErrorCode.NO_SESSION)]),
        (gradient(1), [run_backward(1)]),
    ],
    "a silent edge is left out, and takes part again when it is back": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (ev.EdgeFellSilent(2), [run_backward(1)]),
        (gradient(2), [refused(2, forward_id(2, 0) + 1, ErrorCode.BEHIND)]),
        *applied_after((1,), [grad(1)]),
        (smashed(1, 1), [run_forward(1, step=1)]),
        (ev.EdgeCameBack(2), []),
        (smashed(2, 0), []),
        (forward_done(1), [hidden(1, 1)]),
        (gradient(1, 1), [run_backward(1, step=1)]),
        *applied_after((1,), [grad(1, 1, hub_step=2)]),
        (smashed(1, 2), [act.RunForward(((1, "s1.2"), (2, "s2.0")))]),
    ],
    "a gradient that was here before its edge fell silent counts": [
        *HIDDEN_OF_TWO,
        (gradient(2), []),
        (ev.EdgeFellSilent(2), []),
        (gradient(1), [run_backward(1, 2)]),
    ],
    "everybody silent: nothing closes, and the first one back goes on": [
        *STEP_OF_TWO,
        (ev.EdgeFellSilent(1), []),
        (ev.EdgeFellSilent(2), []),
        (ev.EdgeCameBack(1), []),
        (smashed(1, 1), [run_forward(1, step=1)]),
    ],
    "both silent before the first step, both back": [
        (joined(1), []),
        (ev.EdgeFellSilent(1), []),
        (joined(2), []),
        (smashed(2), []),
        (ev.EdgeCameBack(1), []),
        (smashed(1), [run_forward(1, 2)]),
    ],
    "a bad tensor is refused to its edge alone": [
        *FORWARD_OF_TWO,
        (
            ev.ForwardDone({1: "h1", 2: "not finite"}),
            [hidden(1), act.AnswerForward(2, forward_id(2, 0), 0, "not finite")],
        ),
    ],
    "a repeated forward withdraws the step from the joined one": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (ev.SmashedReceived(2, 777, 0, "again"), [run_backward(1)]),
        (gradient(2), [refused(2, forward_id(2, 0) + 1, ErrorCode.BEHIND)]),
        *applied_after((1,), [grad(1)]),
        (smashed(1, 1), [act.RunForward(((1, "s1.1"), (2, "again")))]),
    ],
    "a forward that is repeated while it is computed is taken from the next": [
        *FORWARD_OF_TWO,
        (ev.SmashedReceived(2, 777, 0, "again"), []),
        (forward_done(1, 2), [hidden(1), hidden(2)]),
        (gradient(2), [refused(2, forward_id(2, 0) + 1, ErrorCode.BEHIND)]),
        (gradient(1), [run_backward(1)]),
    ],
    "a step that is being applied is not begun again": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (gradient(2), [run_backward(1, 2)]),
        (backward_done(1, 2), [act.ApplyStep((1, 2))]),
        (ev.SmashedReceived(2, 777, 0, "again"), []),
        (ev.GradientReceived(2, 778, 0, "again"), [refused(2, forward_id(2, 0) + 1, ErrorCode.BEHIND)]),
        (
            ev.StepApplied((1, 2)),
            [
                grad(1),
                act.AnswerBackward(2, 778, 0, "d2", 1, False),
                refused(2, 777, ErrorCode.BEHIND),
            ],
        ),
        (ev.SmashedReceived(2, 779, 0, "again"), [refused(2, 779, ErrorCode.BEHIND)]),
    ],
    "a step that is begun anew in its backward counts for nothing": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (gradient(2), [run_backward(1, 2)]),
        (ev.SmashedReceived(2, 777, 0, "again"), []),
        (backward_done(1, 2), [refused(2, forward_id(2, 0) + 1, ErrorCode.BEHIND), act.ApplyStep((1,))]),
        (ev.StepApplied((1,)), [grad(1)]),
        (smashed(1, 1), [act.RunForward(((1, "s1.1"), (2, "again")))]),
    ],
    "a newer request takes the place of one that waits": [
        (joined(1), []),
        (smashed(1), []),
        (ev.SmashedReceived(1, 777, 0, "again"), [refused(1, forward_id(1, 0), ErrorCode.BEHIND)]),
        (joined(2), []),
        (smashed(2), [act.RunForward(((1, "again"), (2, "s2.0")))]),
    ],
    "a session that is gone is told nothing, and its caches are freed": [
        *FORWARD_OF_TWO,
        (ev.EdgeGone(2), []),
        (forward_done(1, 2), [hidden(1), act.FreeStreams(((2, 0),))]),
        (gradient(1), []),
        (ev.HousekeepingDone(), [run_backward(1)]),
        *applied_after((1,), [grad(1)]),
    ],
    "everybody gone in the middle of a step: it is dropped, and counts for nothing": [
        *HIDDEN_OF_TWO,
        (ev.EdgeGone(1), [act.FreeStreams(((1, 0),))]),
        (ev.EdgeGone(2), []),
        (ev.HousekeepingDone(), [act.ApplyStep(())]),
        (ev.StepApplied(()), [act.FreeStreams(((2, 0),))]),
        (ev.HousekeepingDone(), []),
        (joined(3), []),
        (joined(4), []),
        (smashed(3), []),
        (smashed(4), [run_forward(3, 4)]),
        (forward_done(3, 4), [hidden(3), hidden(4)]),
        (gradient(3), []),
        (gradient(4), [run_backward(3, 4)]),
        *applied_after((3, 4), [grad(3, hub_step=1), grad(4, hub_step=1)]),
    ],
    "who does not train is refused": [
        (ev.EdgeJoined(1, "reader", False), []),
        (smashed(1), [refused(1, forward_id(1, 0), ErrorCode.NO_SESSION)]),
        (gradient(1), [refused(1, forward_id(1, 0) + 1, ErrorCode.NO_SESSION)]),
    ],
    "inference waits for the computation under way, then goes in one batch": [
        (joined(1), []),
        (joined(2), []),
        (ev.InferReceived(8, 1, "x"), [act.RunInfer(((8, 1, "x"),))]),
        (ev.InferReceived(8, 2, "y"), []),
        (ev.InferReceived(9, 1, "z"), []),
        (ev.InferDone(((8, 1, "X"),)), [act.AnswerInfer(8, 1, "X"), act.RunInfer(((8, 2, "y"), (9, 1, "z")))]),
    ],
    "of four sessions that generate, two go at a time": [
        (ev.InferReceived(6, 1, "a"), [act.RunInfer(((6, 1, "a"),))]),
        (ev.InferReceived(7, 1, "b"), []),
        (ev.InferReceived(8, 1, "c"), []),
        (ev.InferReceived(8, 2, "c2"), []),
        (ev.InferReceived(9, 1, "d"), []),
        (
            ev.InferDone(((6, 1, "A"),)),
            [act.AnswerInfer(6, 1, "A"), act.RunInfer(((7, 1, "b"), (8, 1, "c"), (8, 2, "c2")))],
        ),
        (ev.InferReceived(6, 2, "a2"), []),
        (
            ev.InferDone(((7, 1, "B"), (8, 1, "C"), (8, 2, "C2"))),
            [
                act.AnswerInfer(7, 1, "B"),
                act.AnswerInfer(8, 1, "C"),
                act.AnswerInfer(8, 2, "C2"),
                act.RunInfer(((9, 1, "d"), (6, 2, "a2"))),
            ],
        ),
    ],
    "inference and training take turns": [
        *FORWARD_OF_TWO[:3],
        (ev.InferReceived(8, 1, "x"), [act.RunInfer(((8, 1, "x"),))]),
        (smashed(2), []),
        (ev.InferReceived(8, 2, "y"), []),
        (ev.InferDone(((8, 1, "X"),)), [act.AnswerInfer(8, 1, "X"), run_forward(1, 2)]),
        (ev.InferReceived(8, 3, "z"), []),
        (
            forward_done(1, 2),
            [hidden(1), hidden(2), act.RunInfer(((8, 2, "y"), (8, 3, "z")))],
        ),
        (gradient(1), []),
        (gradient(2), []),
        (ev.InferReceived(8, 4, "w"), []),
        (
            ev.InferDone(((8, 2, "Y"), (8, 3, "Z"))),
            [act.AnswerInfer(8, 2, "Y"), act.AnswerInfer(8, 3, "Z"), run_backward(1, 2)],
        ),
        *applied_after((1, 2), [grad(1), grad(2), act.RunInfer(((8, 4, "w"),))]),
    ],
    "inference of a session that is gone is not answered": [
        (ev.InferReceived(8, 1, "x"), [act.RunInfer(((8, 1, "x"),))]),
        (ev.InferReceived(8, 2, "y"), []),
        (ev.InferReceived(9, 1, "z"), []),
        (ev.EdgeGone(8), []),
        (ev.InferDone(((8, 1, "X"),)), [act.FreeStreams(((8, 0),))]),
        (ev.StreamClosed(9, 3), []),
        (ev.HousekeepingDone(), [act.FreeStreams(((9, 3),))]),
        (ev.HousekeepingDone(), [act.RunInfer(((9, 1, "z"),))]),
    ],
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_of_a_cohort_of_two(scenario: str) -> None:
    play(scheduler(), SCENARIOS[scenario])


#: Rounds of one step.
ONE_STEP = [
    *HIDDEN_OF_TWO,
    (gradient(1), []),
    (gradient(2), [run_backward(1, 2)]),
    *applied_after((1, 2), [grad(1, closes=True), grad(2, closes=True)]),
]
ROUNDS: dict[str, list[tuple[ev.Event, Sequence[object]]]] = {
    "a round closes when all who trained in it have uploaded": [
        *ONE_STEP,
        (uploaded(2), []),
        (awaited(2), []),
        (smashed(2, 1), []),
        (uploaded(1), [close_round(0, 1, 2)]),
        (ev.RoundPublished(1), [published(2, 1, 1), refused(2, forward_id(2, 1), ErrorCode.BEHIND)]),
        (awaited(1), [published(1, 1, 1)]),
        (smashed(1, 1), []),
        (smashed(2, 1), [run_forward(1, 2, step=1)]),
    ],
    "one that joined too late to train is not waited for": [
        *ONE_STEP,
        (joined(3), []),
        (uploaded(1), []),
        (uploaded(2), [close_round(0, 1, 2)]),
    ],
    "one that falls silent is not waited for, unless it has uploaded": [
        *ONE_STEP,
        (uploaded(1), []),
        (ev.EdgeFellSilent(2), [close_round(0, 1)]),
    ],
    "what one uploaded before it fell silent is taken": [
        *ONE_STEP,
        (uploaded(2), []),
        (ev.EdgeFellSilent(2), []),
        (uploaded(1), [close_round(0, 1, 2)]),
    ],
    "one that is back in time is taken": [
        *HIDDEN_OF_TWO,
        (gradient(1), []),
        (gradient(2), [run_backward(1, 2)]),
        (ev.EdgeFellSilent(2), []),
        *applied_after((1, 2), [grad(1, closes=True), grad(2, closes=True)]),
        (ev.EdgeCameBack(2), []),
        (uploaded(2), []),
        (uploaded(1), [close_round(0, 1, 2)]),
    ],
    "one that is gone is not waited for": [
        *ONE_STEP,
        (uploaded(1), []),
        (ev.EdgeGone(2), [act.FreeStreams(((2, 0),))]),
        (ev.HousekeepingDone(), [close_round(0, 1)]),
    ],
    "what one uploaded before it was gone is taken": [
        *ONE_STEP,
        (uploaded(2), []),
        (ev.EdgeGone(2), [act.FreeStreams(((2, 0),))]),
        (ev.HousekeepingDone(), []),
        (uploaded(1), [close_round(0, 1, 2)]),
        (ev.RoundPublished(1), []),
        (smashed(1, 1), [run_forward(1, step=1)]),
    ],
    "one that leaves without being done is not waited for": [
        *ONE_STEP,
        (uploaded(1), []),
        (ev.EdgeLeft(2, False), [close_round(0, 1)]),
        (ev.RoundPublished(1), []),
    ],
    "an upload for another round is passed over": [
        *ONE_STEP,
        (uploaded(1, 1), []),
        (uploaded(2), []),
        (uploaded(1), [close_round(0, 1, 2)]),
    ],
    "those who wait for a later round wait on": [
        *ONE_STEP,
        (uploaded(1), []),
        (awaited(1, 1), []),
        (uploaded(2), [close_round(0, 1, 2)]),
        (awaited(2, 0), []),
        (ev.RoundPublished(1), [published(2, 1, 1)]),
    ],
}


@pytest.mark.parametrize("scenario", ROUNDS)
def test_scenarios_of_rounds_of_one_step(scenario: str) -> None:
    play(scheduler(round_steps=1), ROUNDS[scenario])


def test_done_members_close_the_round_when_nobody_has_steps_left() -> None:
    """Their adapters are in it although they have left, and they are told of the publication."""
    play(
        scheduler(),
        [
            *STEP_OF_TWO,
            (uploaded(1), []),
            (ev.EdgeLeft(1, True), []),
            (awaited(1), []),
            (smashed(2, 1), [run_forward(2, step=1)]),
            (forward_done(2), [hidden(2, 1)]),
            (gradient(2, 1), [run_backward(2, step=1)]),
            *applied_after((2,), [grad(2, 1, hub_step=2)]),
            (uploaded(2), []),
            (ev.EdgeLeft(2, True), [close_round(0, 1, 2)]),
            (awaited(2), []),
            (ev.RoundPublished(1), [published(1, 1, 1), published(2, 1, 1)]),
            (joined(3), []),
            (smashed(3), []),
            (joined(4), []),
            (smashed(4), [run_forward(3, 4)]),
        ],
    )


def test_done_members_do_not_wait_for_silent_ones() -> None:
    play(
        scheduler(),
        [
            *STEP_OF_TWO,
            (uploaded(1), []),
            (ev.EdgeLeft(1, True), []),
            (awaited(1), []),
            (ev.EdgeFellSilent(2), [close_round(0, 1)]),
            (ev.RoundPublished(1), [published(1, 1, 1)]),
            (ev.EdgeCameBack(2), []),
            (smashed(2, 1), [run_forward(2, step=1)]),
        ],
    )


def test_a_round_without_a_step_is_answered_at_once() -> None:
    """An edge that has nothing left to do must not wait for a round that nobody will take a step in."""
    play(
        scheduler(cohort=1),
        [(joined(1), []), (ev.EdgeLeft(1, True), []), (awaited(1), [published(1, 0, 0)])],
    )


def test_an_edge_that_starts_anew_goes_on_in_the_round_that_is_open() -> None:
    """Its old session ends without a word; the round is not closed over its head."""
    hub = scheduler(cohort=1)
    play(
        hub,
        [
            (joined(1), []),
            (smashed(1), [run_forward(1)]),
            (forward_done(1), [hidden(1)]),
            (gradient(1), [run_backward(1)]),
            *applied_after((1,), [grad(1)]),
            (ev.EdgeGone(1), [act.FreeStreams(((1, 0),))]),
            (ev.HousekeepingDone(), []),
            (joined(2, "edge1", applied=1), []),
            (smashed(2, 1), [run_forward(2, step=1)]),
        ],
    )
    assert (hub.state.round, hub.state.round_step) == (0, 1)


def test_training_is_over_after_the_last_round() -> None:
    play(
        scheduler(round_steps=1, rounds=1),
        [
            *ONE_STEP,
            (joined(3), []),
            (smashed(3), []),
            (uploaded(1), []),
            (uploaded(2), [close_round(0, 1, 2)]),
            (ev.EdgeFellSilent(3), []),
            (awaited(1), []),
            (
                ev.RoundPublished(1),
                [published(1, 1, 1, over=True), refused(3, forward_id(3, 0), ErrorCode.TRAINING_OVER)],
            ),
            (awaited(2), [published(2, 1, 1, over=True)]),
            (smashed(1, 1), [refused(1, forward_id(1, 1), ErrorCode.TRAINING_OVER)]),
            (ev.InferReceived(8, 1, "x"), [act.RunInfer(((8, 1, "x"),))]),
        ],
    )


def test_a_hub_that_starts_after_its_last_round_only_serves() -> None:
    done = Scheduler(State(1, 20, rounds=2, round=2, version=2))
    assert done.state.phase is Phase.OVER
    play(done, [(joined(1), []), (smashed(1), [refused(1, forward_id(1, 0), ErrorCode.TRAINING_OVER)])])


def test_a_gradient_that_fails_is_no_step() -> None:
    """Neither the edge's count nor the hub's moves, and the round does not close by it."""
    error = NotFinite("not finite")
    hub = scheduler(cohort=1, round_steps=1)
    play(
        hub,
        [
            (joined(1), []),
            (smashed(1), [run_forward(1)]),
            (forward_done(1), [hidden(1)]),
            (gradient(1), [run_backward(1)]),
            (ev.BackwardDone({1: error}), [act.AnswerBackward(1, 101, 0, error, 0, False), act.ApplyStep(())]),
            (ev.StepApplied(()), []),
            (smashed(1), [run_forward(1)]),
            (ev.ForwardDone({1: error}), [act.AnswerForward(1, 100, 0, error), act.ApplyStep(())]),
            (ev.StepApplied(()), []),
        ],
    )
    assert (hub.state.hub_step, hub.state.members[1].applied, hub.state.members[1].contributes) == (0, 0, False)


def test_a_hub_that_stops_begins_nothing() -> None:
    hub = scheduler(cohort=1)
    hub.state.stopping = True
    play(hub, [(joined(1), []), (smashed(1), []), (ev.InferReceived(8, 1, "x"), []), (ev.StreamClosed(8, 1), [])])


def test_people_are_told_who_comes_and_goes() -> None:
    hub = scheduler()
    events = [
        joined(1),
        joined(2),
        joined(3),
        ev.EdgeFellSilent(3),
        ev.EdgeCameBack(3),
        ev.EdgeLeft(3, True),
        ev.EdgeGone(1),
    ]
    notes = [action.text for event in events for action in hub.handle(event) if isinstance(action, act.Note)]
    assert notes == [
        "edge1 joined (1 of 2 edges)",
        "edge2 joined (2 of 2 edges)",
        "edge3 joined",
        "edge3 is silent: going on without it",
        "edge3 is back",
        "edge3 has taken all its steps",
        "edge1 is gone",
    ]


# -- processes that are killed --------------------------------------------------------------------------------


def again(session: int, request: int, step: int = 0, same: bool = True) -> ev.Event:
    """A new process asks for a step that was asked before, with the same bytes or with others."""
    text = f"s{session}.{step}" if same else "other"
    return ev.SmashedReceived(session, request, step, text, text.encode())


def forward_done_of(*sessions: int, step: int = 0) -> ev.Event:
    return ev.ForwardDone({s: f"h{s}" for s in sessions}, {s: f"s{s}.{step}".encode() for s in sessions})


FREE_TWO = act.FreeStreams(((2, 0),))
#: Two edges have their hidden states; then the process of the second is killed and begins anew.
KILLED_WITH_HIDDEN: list[tuple[ev.Event, Sequence[object]]] = [
    *FORWARD_OF_TWO,
    (forward_done_of(1, 2), [hidden(1), hidden(2)]),
    (ev.EdgeRestarted(2), [FREE_TWO]),
    (ev.HousekeepingDone(), []),
]
#: Both gave their gradients, the step is applied, and the second was killed before it heard.
KILLED_WHEN_APPLIED: list[tuple[ev.Event, Sequence[object]]] = [
    *FORWARD_OF_TWO,
    (forward_done_of(1, 2), [hidden(1), hidden(2)]),
    (gradient(1), []),
    (gradient(2), [run_backward(1, 2)]),
    (ev.EdgeRestarted(2), []),
    *applied_after((1, 2), [grad(1), FREE_TWO]),
    (ev.HousekeepingDone(), []),
]

KILLS: dict[str, Sequence[tuple[ev.Event, Sequence[object]]]] = {
    "killed while its forward waits: it asks again": [
        (joined(1), []),
        (joined(2), []),
        (smashed(2), []),
        (ev.EdgeRestarted(2), [FREE_TWO]),
        (ev.HousekeepingDone(), []),
        (smashed(1), []),
        (again(2, 1), [act.RunForward(((1, "s1.0"), (2, "s2.0")))]),
    ],
    "killed while its forward is computed: the new process gets the answer, the old one none": [
        *FORWARD_OF_TWO,
        (ev.EdgeRestarted(2), []),
        (again(2, 1), []),
        (forward_done_of(1, 2), [hidden(1), act.AnswerForward(2, 1, 0, "h2"), FREE_TWO]),
    ],
    "killed while its forward is computed, and not yet back": [
        *FORWARD_OF_TWO,
        (ev.EdgeRestarted(2), []),
        (forward_done_of(1, 2), [hidden(1), FREE_TWO]),
        (ev.HousekeepingDone(), []),
        (again(2, 1), [act.AnswerForward(2, 1, 0, "h2")]),
        (gradient(1), []),
        (ev.GradientReceived(2, 2, 0, "g2.0"), [run_backward(1, 2)]),
    ],
    "killed with its hidden state: the same bytes are told the same": [
        *KILLED_WITH_HIDDEN,
        (again(2, 1), [act.AnswerForward(2, 1, 0, "h2")]),
        (gradient(1), []),
        (ev.GradientReceived(2, 2, 0, "g2.0"), [run_backward(1, 2)]),
    ],
    "killed with its hidden state: other bytes are a step begun anew": [
        *KILLED_WITH_HIDDEN,
        (again(2, 1, same=False), []),
        (gradient(1), [run_backward(1)]),
        *applied_after((1,), [grad(1)]),
        (smashed(1, 1), [act.RunForward(((1, "s1.1"), (2, "other")))]),
    ],
    "killed before it heard that its step is applied: it is told again, and nothing is applied again": [
        *KILLED_WHEN_APPLIED,
        (again(2, 1), [act.AnswerForward(2, 1, 0, "h2")]),
        (ev.GradientReceived(2, 2, 0, "g2.0"), [act.AnswerBackward(2, 2, 0, "d2", 1, False)]),
        (smashed(1, 1), []),
        (smashed(2, 1), [run_forward(1, 2, step=1)]),
    ],
    "killed before it heard, and back with other bytes: that step is over": [
        *KILLED_WHEN_APPLIED,
        (again(2, 1, same=False), [refused(2, 1, ErrorCode.BEHIND)]),
    ],
    "killed in the backward, back before it is done": [
        *KILLED_WHEN_APPLIED[:-2],
        (again(2, 1), [act.AnswerForward(2, 1, 0, "h2")]),
        (ev.GradientReceived(2, 2, 0, "g2.0"), []),
        *applied_after((1, 2), [grad(1), act.AnswerBackward(2, 2, 0, "d2", 1, False), FREE_TWO]),
    ],
    "killed when it had left: its place is its own again": [
        *STEP_OF_TWO,
        (uploaded(2), []),
        (ev.EdgeLeft(2, True), []),
        (ev.EdgeRestarted(2), [FREE_TWO]),
        (ev.HousekeepingDone(), []),
        (smashed(1, 1), []),
        (ev.EdgeLeft(2, True), [run_forward(1, step=1)]),
    ],
}


@pytest.mark.parametrize("scenario", KILLS)
def test_scenarios_of_processes_that_are_killed(scenario: str) -> None:
    play(scheduler(), KILLS[scenario])


def test_a_checkpoint_that_is_due_goes_with_the_next_joined_forward_and_no_other() -> None:
    play(
        scheduler(),
        [
            *HIDDEN_OF_TWO,
            (ev.CheckpointDue(), []),
            (gradient(1), []),
            (gradient(2), [run_backward(1, 2)]),
            *applied_after((1, 2), [grad(1), grad(2)]),
            (smashed(1, 1), []),
            (smashed(2, 1), [act.RunForward(((1, "s1.1"), (2, "s2.1")), checkpoint=True)]),
            (forward_done(1, 2), [hidden(1, 1), hidden(2, 1)]),
            (gradient(1, 1), []),
            (gradient(2, 1), [run_backward(1, 2, step=1)]),
            *applied_after((1, 2), [grad(1, 1, hub_step=2), grad(2, 1, hub_step=2)]),
            (smashed(1, 2), []),
            (smashed(2, 2), [run_forward(1, 2, step=2)]),
        ],
    )


def test_a_forward_that_waits_over_a_publication_is_asked_for_anew() -> None:
    """It was made with the adapter before it."""
    play(
        scheduler(cohort=1, round_steps=1),
        [
            (joined(1), []),
            (smashed(1), [run_forward(1)]),
            (forward_done(1), [hidden(1)]),
            (gradient(1), [run_backward(1)]),
            *applied_after((1,), [grad(1, closes=True)]),
            (joined(2), []),
            (smashed(2), []),
            (uploaded(1), [close_round(0, 1)]),
            (ev.EdgeLeft(1, True), []),
            (ev.RoundPublished(1), [refused(2, forward_id(2, 0), ErrorCode.BEHIND)]),
            (smashed(2), [run_forward(2)]),
            (forward_done(2), [hidden(2)]),
            (gradient(2), [run_backward(2)]),
            *applied_after((2,), [grad(2, hub_step=2, closes=True)]),
            (uploaded(2, 1), [close_round(1, 2)]),
        ],
    )


def test_who_awaits_a_closing_round_without_an_upload_is_not_waited_for() -> None:
    """An edge that lost the answer which said that the round closes has nothing for it."""
    play(scheduler(round_steps=1), [*ONE_STEP, (uploaded(1), []), (awaited(2), [close_round(0, 1)])])


def test_an_edge_that_was_gone_and_uploads_from_another_seat_is_in_the_round_once() -> None:
    play(
        scheduler(round_steps=1),
        [
            *ONE_STEP,
            (uploaded(2), []),
            (ev.EdgeGone(2), [FREE_TWO]),
            (ev.HousekeepingDone(), []),
            (joined(3, "edge2", applied=1), []),
            (uploaded(3), []),
            (uploaded(1), [close_round(0, 1, 3)]),
        ],
    )


def test_what_was_uploaded_before_the_last_step_of_a_round_is_not_in_it() -> None:
    """A hub that stopped while its round closed, and starts with more steps to a round."""
    hub = scheduler()
    hub.state.round_step = 1
    play(
        hub,
        [
            (joined(1, applied=1), []),
            (joined(2, applied=1), []),
            (ev.AdapterUploaded(1, 0, "too early"), []),
            (awaited(1), [refused(1, 901, ErrorCode.BEHIND)]),
            (smashed(1, 1), []),
            (smashed(2, 1), [run_forward(1, 2, step=1)]),
            (forward_done(1, 2), [hidden(1, 1), hidden(2, 1)]),
            (gradient(1, 1), []),
            (gradient(2, 1), [run_backward(1, 2, step=1)]),
            *applied_after((1, 2), [grad(1, 1), grad(2, 1)]),
            (ev.EdgeLeft(2, True), []),
            (uploaded(2), []),
            (awaited(2), []),
            (ev.EdgeLeft(1, True), []),
            (uploaded(1), [close_round(0, 1, 2)]),
        ],
    )


# -- micro-batches ---------------------------------------------------------------------------------------------

# Requests of micro-batch j are numbered 1000 * (j + 1) and on.


def part_id(session: int, micro: int, step: int = 0) -> int:
    return 1000 * (micro + 1) + forward_id(session, step)


def part(session: int, micro: int, micros: int, step: int = 0, same: str = "") -> ev.Event:
    """A forward; with `same`, one that was asked before, of these bytes."""
    text = same or f"s{session}.{step}.{micro}"
    request = part_id(session, micro, step) + (500_000 if same else 0)
    return ev.SmashedReceived(session, request, step, text, same.encode(), micro, micros)


def part_gradient(session: int, micro: int, step: int = 0) -> ev.Event:
    return ev.GradientReceived(session, part_id(session, micro, step) + 1, step, f"g{session}.{step}.{micro}", micro)


def run_part(micro: int, *sessions: int, step: int = 0) -> act.Action:
    return act.RunForward(tuple((s, f"s{s}.{step}.{micro}") for s in sessions), micro=micro)


def run_part_backward(micro: int, *sessions: int) -> act.Action:
    return act.RunBackward({s: f"g{s}.0.{micro}" for s in sessions}, micro)


def part_done(micro: int, *sessions: int) -> ev.Event:
    return ev.ForwardDone({s: f"h{s}.{micro}" for s in sessions}, {s: f"s{s}.0.{micro}".encode() for s in sessions})


def part_backward_done(micro: int, *sessions: int) -> ev.Event:
    return ev.BackwardDone({s: f"d{s}.{micro}" for s in sessions})


def part_hidden(session: int, micro: int) -> act.Action:
    return act.AnswerForward(session, part_id(session, micro), 0, f"h{session}.{micro}", micro)


def part_grad(session: int, micro: int, hub_step: int = 0, request: int = 0) -> act.Action:
    request = request or part_id(session, micro) + 1
    return act.AnswerBackward(session, request, 0, f"d{session}.{micro}", hub_step, False, micro)


BAD = NotFinite("not finite")
#: One edge with three micro-batches and one with one; the first two forwards of the first are done.
THREE_AND_ONE: list[tuple[ev.Event, Sequence[object]]] = [
    (joined(1), []),
    (joined(2), []),
    (part(1, 0, 3), []),
    (part(1, 1, 3), []),
    (part(2, 0, 1), [run_part(0, 1, 2)]),
    (part_done(0, 1, 2), [part_hidden(1, 0), part_hidden(2, 0), run_part(1, 1)]),
    (part_gradient(1, 0), []),
    (part_done(1, 1), [part_hidden(1, 1)]),
]

PARTS: dict[str, list[tuple[ev.Event, Sequence[object]]]] = {
    "micro-batches of two edges are joined while both have them, and the optimizer steps once": [
        *THREE_AND_ONE,
        (part_gradient(2, 0), [run_part_backward(0, 1, 2)]),
        (part(1, 2, 3), []),
        (part_gradient(1, 1), []),
        # The backward goes first; the second edge hears when the step is applied.
        (part_backward_done(0, 1, 2), [part_grad(1, 0), run_part_backward(1, 1)]),
        (part_backward_done(1, 1), [part_grad(1, 1), run_part(2, 1)]),
        (part_done(2, 1), [part_hidden(1, 2)]),
        (part_gradient(1, 2), [run_part_backward(2, 1)]),
        (part_backward_done(2, 1), [act.ApplyStep((1, 2))]),
        (ev.StepApplied((1, 2)), [part_grad(1, 2, 1), part_grad(2, 0, 1)]),
    ],
    "one that falls silent in the middle of its step is out of it, the other's counts": [
        *THREE_AND_ONE,
        (part_gradient(2, 0), [run_part_backward(0, 1, 2)]),
        (part_backward_done(0, 1, 2), [part_grad(1, 0)]),
        (ev.EdgeFellSilent(1), [act.ApplyStep((2,))]),
        (ev.StepApplied((2,)), [part_grad(2, 0, 1)]),
        (ev.EdgeCameBack(1), []),
        (part(1, 2, 3), [refused(1, part_id(1, 2), ErrorCode.BEHIND)]),
        (part_gradient(1, 1), [refused(1, part_id(1, 1) + 1, ErrorCode.BEHIND)]),
        (part(1, 0, 3), []),
        (part(1, 1, 3), []),
    ],
    "one whose gradients are all here before it falls silent is in the step": [
        *THREE_AND_ONE,
        (part_gradient(2, 0), [run_part_backward(0, 1, 2)]),
        (ev.EdgeFellSilent(2), []),
        (part_backward_done(0, 1, 2), [part_grad(1, 0)]),
        (ev.EdgeFellSilent(1), [act.ApplyStep((2,))]),
        (ev.StepApplied((2,)), [part_grad(2, 0, 1)]),
    ],
    "killed in the middle of a step: the same bytes are told the same, and it goes on from there": [
        *THREE_AND_ONE,
        (part_gradient(2, 0), [run_part_backward(0, 1, 2)]),
        (part_backward_done(0, 1, 2), [part_grad(1, 0)]),
        (ev.EdgeRestarted(1), [act.FreeStreams(((1, 0),))]),
        (ev.HousekeepingDone(), []),
        (part(1, 0, 3, same="s1.0.0"), [act.AnswerForward(1, part_id(1, 0) + 500_000, 0, "h1.0", 0)]),
        (part(1, 1, 3, same="s1.0.1"), [act.AnswerForward(1, part_id(1, 1) + 500_000, 0, "h1.1", 1)]),
        (part_gradient(1, 0), [part_grad(1, 0)]),
        (part(1, 2, 3), [run_part(2, 1)]),
        (part_gradient(1, 1), []),
        (part_done(2, 1), [part_hidden(1, 2), run_part_backward(1, 1)]),
    ],
    "killed while its last gradient is computed: the new process hears it when the step is applied": [
        (joined(1), []),
        (joined(2), []),
        (ev.EdgeLeft(2, True), []),
        (part(1, 0, 2), [run_part(0, 1)]),
        (part(1, 1, 2), []),
        (part_done(0, 1), [part_hidden(1, 0), run_part(1, 1)]),
        (part_gradient(1, 0), []),
        (part_done(1, 1), [part_hidden(1, 1), run_part_backward(0, 1)]),
        (part_gradient(1, 1), []),
        (part_backward_done(0, 1), [part_grad(1, 0), run_part_backward(1, 1)]),
        (ev.EdgeRestarted(1), []),
        (ev.GradientReceived(1, 77, 0, "g1.0.0", 0), [part_grad(1, 0, request=77)]),
        (ev.GradientReceived(1, 78, 0, "g1.0.1", 1), []),
        (part_backward_done(1, 1), [act.ApplyStep((1,))]),
        (ev.StepApplied((1,)), [part_grad(1, 1, 1, request=78), act.FreeStreams(((1, 0),))]),
        (ev.GradientReceived(1, 79, 0, "g1.0.0", 0), [part_grad(1, 0, request=79)]),
        (ev.GradientReceived(1, 80, 0, "g1.0.1", 1), [part_grad(1, 1, 1, request=80)]),
    ],
    "a step begun anew with other bytes in its middle: what waits of the first try is refused": [
        *THREE_AND_ONE,
        (part(1, 2, 3), [run_part(2, 1)]),
        (
            part(1, 0, 3, same="other"),
            [refused(1, part_id(1, 0) + 1, ErrorCode.BEHIND)],
        ),
        (part_gradient(2, 0), []),
        (part_done(2, 1), [refused(1, part_id(1, 2), ErrorCode.BEHIND), run_part_backward(0, 2)]),
        (part_backward_done(0, 2), [act.ApplyStep((2,))]),
        (ev.StepApplied((2,)), [part_grad(2, 0, 1)]),
    ],
    "a later micro-batch with other bytes, or of another count, has to begin with the first": [
        *THREE_AND_ONE,
        (part(1, 2, 4), [refused(1, part_id(1, 2), ErrorCode.BEHIND)]),
        (
            part(1, 1, 3, same="other"),
            [refused(1, part_id(1, 0) + 1, ErrorCode.BEHIND), refused(1, part_id(1, 1) + 500_000, ErrorCode.BEHIND)],
        ),
        (part_gradient(2, 0), [run_part_backward(0, 2)]),
    ],
    "a micro-batch that is not finite takes its whole step out": [
        *THREE_AND_ONE,
        (part_gradient(2, 0), [run_part_backward(0, 1, 2)]),
        (part(1, 2, 3), []),
        (
            ev.BackwardDone({1: BAD, 2: "d2.0"}),
            [
                act.AnswerBackward(1, part_id(1, 0) + 1, 0, BAD, 0, False, 0),
                refused(1, part_id(1, 2), ErrorCode.BEHIND),
                act.ApplyStep((2,)),
            ],
        ),
    ],
    "a checkpoint waits for the end of the step": [
        *THREE_AND_ONE,
        (ev.CheckpointDue(), []),
        (part(1, 2, 3), [run_part(2, 1)]),
    ],
}


@pytest.mark.parametrize("scenario", PARTS)
def test_scenarios_of_micro_batches(scenario: str) -> None:
    play(scheduler(), PARTS[scenario])


# -- steps that do not wait for everybody ---------------------------------------------------------------------------

TWO_OF_THREE: list[tuple[ev.Event, Sequence[object]]] = [
    (joined(1), []),
    (joined(2), []),
    (joined(3), []),
    (smashed(1), [act.StartDeadline(1)]),
    (ev.DeadlinePassed(1), []),
    (smashed(3), [run_forward(1, 3)]),
    (forward_done(1, 3), [hidden(1), hidden(3)]),
    (smashed(2), []),
    (gradient(1), []),
    (gradient(3), [run_backward(1, 3)]),
]
QUORUMS: dict[str, tuple[int, list[tuple[ev.Event, Sequence[object]]]]] = {
    "all of them before the deadline: nobody is left out": (
        20,
        [
            *TWO_OF_THREE[:4],
            (smashed(3), []),
            (smashed(2), [run_forward(1, 2, 3)]),
            (ev.DeadlinePassed(1), []),
        ],
    ),
    "enough of them at the deadline: the late one is in the next step": (
        20,
        [
            *TWO_OF_THREE,
            # It waits now, and so begins the next deadline.
            (backward_done(1, 3), [act.ApplyStep((1, 3))]),
            (ev.StepApplied((1, 3)), [grad(1), grad(3), act.StartDeadline(2)]),
            (ev.DeadlinePassed(1), []),
            (smashed(1, 1), []),
            (ev.DeadlinePassed(2), [act.RunForward(((1, "s1.1"), (2, "s2.0")))]),
        ],
    ),
    "less than enough at the deadline: it goes when there are enough": (20, TWO_OF_THREE),
    "who leaves is not waited for, deadline or not": (
        20,
        [
            *TWO_OF_THREE[:4],
            (ev.EdgeLeft(2, False), []),
            (smashed(3), [run_forward(1, 3)]),
        ],
    ),
    "a late one that took a step in the round is told that it closes": (
        2,
        [
            *TWO_OF_THREE,
            (backward_done(1, 3), [act.ApplyStep((1, 3))]),
            (ev.StepApplied((1, 3)), [grad(1), grad(3), act.StartDeadline(2)]),
            (ev.DeadlinePassed(2), []),
            (smashed(1, 1), [act.RunForward(((1, "s1.1"), (2, "s2.0")))]),
            (smashed(3, 1), []),
            (forward_done(1, 2), [hidden(1, 1), hidden(2)]),
            (gradient(1, 1), []),
            (gradient(2), [act.RunBackward({1: "g1.1", 2: "g2.0"})]),
            (backward_done(1, 2), [act.ApplyStep((1, 2))]),
            (
                ev.StepApplied((1, 2)),
                [grad(1, 1, 2, True), grad(2, 0, 2, True), refused(3, forward_id(3, 1), ErrorCode.BEHIND)],
            ),
            (smashed(3, 1), [refused(3, forward_id(3, 1), ErrorCode.BEHIND)]),
            (uploaded(1), []),
            (uploaded(2), []),
            (uploaded(3), [close_round(0, 1, 2, 3)]),
        ],
    ),
}


@pytest.mark.parametrize("scenario", QUORUMS)
def test_scenarios_of_two_of_three(scenario: str) -> None:
    round_steps, rows = QUORUMS[scenario]
    play(Scheduler(State(3, round_steps, 0, quorum=2)), rows)
