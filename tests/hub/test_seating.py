"""Seats over the changes of sessions: an edge that takes another seat takes its steps with it."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest

from blocks.layout import Layout
from hub.credits import Credits
from hub.groups import Group, Groups
from hub.jobs import Place, StepItem
from hub.ledger import Ledger
from hub.membership import Answered, MemberNote
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import HiddenGiven, Member, Phase, State, StepTaken
from hub.seating import Seating
from hub.sessions import Session, Sessions
from hub.store.files import StoreError
from messaging.console import Journal
from messaging.errors import ErrorCode
from messaging.messages import Tensor
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


def seating_of(groups: Groups, sessions: Sessions, ledger: Ledger, left: Collection[str] = ()) -> Seating:
    """Of a hub whose only edge is 'ward', with the key 'key'; `left`: who has left the training, by key."""
    access = SimpleNamespace(name_by_origin=lambda key: {"key": "ward"}.get(key), left=lambda: left)
    desk = SimpleNamespace(place=lambda p, q: Place(p, 3 - q), new_replies=Replies)
    unused: Any = None
    return Seating(sessions, groups, access, desk, unused, ledger, Journal(), 60.0, clock=lambda: 0.0)  # type: ignore[arg-type]


def groups_of(*states: State) -> Groups:
    unused: Any = None
    groups = Groups([Group(number, Scheduler(state), unused, 0.0) for number, state in enumerate(states)], unused)
    groups.decide = lambda event, number: groups[number].scheduler.handle(event) and None
    return groups


def test_an_edge_that_moves_to_another_replica_is_told_again_what_it_may_not_have_heard() -> None:
    groups = groups_of(*(State(1, 20, 0, phase=Phase.FORWARD, joint=True) for _ in range(2)))
    seating = seating_of(groups, Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {}, {"key": 1}))
    answered = Answered("key", {0: HiddenGiven(b"sum", "hidden")}, StepTaken(4, {0: "grad"}, 5, False))
    seating.take_in(MemberNote("key", (1, 1), True, False), [answered], 0)
    (member,) = groups.state(0).members.values()
    again = groups[0].scheduler.handle(ev.SmashedReceived(member.session, 1, 4, "the same step", b"sum"))
    assert again == [act.AnswerForward(member.session, 1, 4, "hidden")]
    again = groups[0].scheduler.handle(ev.GradientReceived(member.session, 2, 4, "gradient"))
    assert again == [act.AnswerBackward(member.session, 2, 4, "grad", 5, False)]


@pytest.mark.parametrize("left", [set(), {"key"}])
def test_nobody_waits_for_an_edge_that_left_after_the_checkpoint(left: set[str]) -> None:
    groups = groups_of(State(1, 20, 0))
    seating = seating_of(groups, Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {}, {}), left)
    seating.restore([MemberNote("key", (1, 1), True, False)], [], True)
    assert [member.name for member in groups.state(0).members.values()] == ([] if left else ["ward"])
    assert groups.state(0).phase is (Phase.GATHERING if left else Phase.FORWARD)


def test_no_round_is_opened_again_for_an_edge_that_has_left() -> None:
    """Its replica is no more, and the others close the round: there is nobody to take another step for."""
    groups = groups_of(State(1, 20, 0, phase=Phase.CLOSING, round_step=20, joint=True))
    seating = seating_of(groups, Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {}, {"key": 1}), {"key"})
    note = MemberNote("key", (1, 1), True, False)
    seating.take_in(note, [], 0)
    assert groups.state(0).phase is Phase.CLOSING
    assert not groups.state(0).members
    seating_of(groups, Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {}, {"key": 1})).take_in(note, [], 0)
    assert groups.state(0).phase is Phase.FORWARD


def test_an_edge_may_leave_while_the_disk_fails() -> None:
    seating = seating_of(groups_of(State(1, 20, 0)), Sessions(0, Credits(1 << 30)), Ledger({}, {}))

    def fails(_: str) -> None:
        raise StoreError("no space left")

    seating._access.note_left = fails  # type: ignore[method-assign]
    session = Session(17, 7, "key", "ward", True, (1, 1), Place(1, 2), None, Replies(), 0.0)
    seating.leaving(session)
    assert "ward leaves, which a hub that is started again may not know: no space left" in seating._journal.recent()[-1]


def test_an_edge_that_leaves_within_a_step_comes_back_to_where_that_is_computed() -> None:
    """Elsewhere it would take the step again, which is counted here yet."""
    state = State(1, 20, 0, phase=Phase.STEPPING, joint=True)
    sessions, ledger = Sessions(0, Credits(1 << 30)), Ledger({"key": 5}, {}, {"key": 1})
    session = Session(17, 7, "key", "ward", True, (1, 1), Place(1, 2), None, Replies(), 0.0, group=1)
    sessions.add(session)
    step = StepItem(7, Place(1, 2), Layout.from_ints((), 1, 0, 1), 3, Tensor("f32", (1, 1, 1), (b"\0" * 4,)))
    seating = seating_of(groups_of(State(1, 20, 0, joint=True), state), sessions, ledger)
    ledger.begins(act.RunForward(((7, step),)), sessions, 1)
    sessions.remove(17)
    assert seating._group_for("key", True) == 1
    ledger.stepped(ev.StepApplied(()), 1)
    assert seating._group_for("key", True) == 0
