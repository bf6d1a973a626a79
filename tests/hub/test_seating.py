"""Seats over the changes of sessions: an edge that takes another seat takes its steps with it."""

from __future__ import annotations

from typing import Any

from hub.credits import Credits
from hub.groups import Group, Groups
from hub.jobs import Place
from hub.ledger import Ledger
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase, State
from hub.seating import Seating
from hub.sessions import Session, Sessions
from messaging.errors import ErrorCode
from messaging.replies import Replies


def test_a_step_that_ends_after_its_edge_took_another_seat_is_not_taken_again() -> None:
    """It gave up its seat while the backward ran, so its new seat was opened one step behind."""
    sessions, ledger = Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {})
    state = State(1, 20, 0, phase=Phase.FORWARD)
    state.members[7] = Member(7, "ward", applied=4)
    session = Session(17, 7, "key", "ward", True, (2, 1), Place(2, 3), None, Replies(), 0.0, applied=4)
    sessions.add(session)
    unused: Any = None
    groups = Groups([Group(0, Scheduler(state), unused, 0.0)], unused)
    seating = Seating(sessions, groups, unused, unused, unused, ledger, unused, 60.0, clock=lambda: 0.0)
    seating.catch_up()
    assert session.applied == 5
    (refusal,) = Scheduler(state).handle(ev.SmashedReceived(7, 1, 4, "the same step"))
    assert isinstance(refusal, act.Refuse)
    assert refusal.code is ErrorCode.BEHIND


def test_nor_is_one_that_waits_in_the_other_seat_by_then() -> None:
    """As above, but its edge had asked for the step again before it was applied."""
    state = State(1, 20, 0, phase=Phase.STEPPING, joined=(6,), applying=(6,), busy=True)
    state.members[7] = Member(7, "ward", applied=4)
    hub = Scheduler(state)
    assert hub.handle(ev.SmashedReceived(7, 1, 4, "the same step")) == []
    state.members[7].applied = 5
    (refusal,) = hub.handle(ev.StepApplied((6,)))
    assert isinstance(refusal, act.Refuse)
    assert refusal.code is ErrorCode.BEHIND
