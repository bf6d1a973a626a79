"""How far every edge is: in the optimizer, in a checkpoint that was begun, in one on the disk."""

from __future__ import annotations

import pytest

from blocks.layout import Layout
from hub.credits import Credits
from hub.jobs import Place, StepItem
from hub.keeper import CheckpointWritten
from hub.ledger import Ledger
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Asked, HiddenGiven, Member, Phase, State, StepTaken
from hub.sessions import Session, Sessions
from messaging.messages import Tensor
from messaging.replies import Replies

TENSOR = Tensor("f32", (1, 1, 1), (b"\0" * 4,))


@pytest.fixture
def sessions() -> Sessions:
    """Two edges that train, keys 'a' and 'b', seats 1 and 2."""
    found = Sessions(0, Credits(1 << 30))
    for seat, key in ((1, "a"), (2, "b")):
        place = Place(1, 3)
        found.add(Session(10 + seat, seat, key, f"edge-{key}", True, (1, 1), place, None, Replies(), 0.0, applied=4))
    return found


def forward(checkpoint: bool = False, micro: int = 0) -> act.RunForward:
    """A joined forward of both, 5 and 7 target tokens."""
    layout = Layout.from_ints((), 1, 0, 1)
    items = [StepItem(seat, Place(1, 3), layout, tokens, TENSOR, micro) for seat, tokens in ((1, 5), (2, 7))]
    return act.RunForward(tuple((item.session, item) for item in items), checkpoint, micro)


def test_a_step_counts_for_those_whose_gradient_was_good(sessions: Sessions) -> None:
    ledger = Ledger({"a": 4, "b": 4}, {"a": 2})
    ledger.begins(forward(), sessions)
    ledger.stepped(ev.StepApplied((1,)))
    assert (ledger.applied("a"), ledger.applied("b")) == (5, 4)
    assert (ledger.round_tokens("a"), ledger.round_tokens("b")) == (7, 0)


def test_the_tokens_of_all_micro_batches_count_for_one_step(sessions: Sessions) -> None:
    ledger = Ledger({"a": 4, "b": 4}, {})
    ledger.begins(forward(), sessions)
    ledger.begins(forward(micro=1), sessions)
    ledger.stepped(ev.StepApplied((1, 2)))
    assert (ledger.applied("a"), ledger.round_tokens("a")) == (5, 10)
    ledger.begins(forward(), sessions)
    ledger.stepped(ev.StepApplied((1,)))
    assert (ledger.applied("a"), ledger.round_tokens("a"), ledger.round_tokens("b")) == (6, 15, 14)


def test_an_adapter_weighs_at_most_what_the_hub_saw_in_this_round(sessions: Sessions) -> None:
    ledger = Ledger({}, {"a": 2})
    ledger.begins(forward(), sessions)
    ledger.stepped(ev.StepApplied((1,)))
    assert ledger.weight("a", 1_000_000) == 7
    assert ledger.weight("a", 3) == 3
    assert ledger.weight("b", 1) == 0
    ledger.published()
    assert ledger.weight("a", 1) == 0


def test_an_edge_is_inside_the_step_of_its_own_group_until_that_is_over(sessions: Sessions) -> None:
    ledger = Ledger({}, {}, {"a": 1, "b": 0})
    assert not ledger.inside("a")
    ledger.begins(forward(), sessions, 1)
    assert (ledger.inside("a"), ledger.inside("b")) == (True, False)
    ledger.stepped(ev.StepApplied((2,)), 1)
    assert not ledger.inside("a")


def test_an_edge_that_is_gone_keeps_its_count(sessions: Sessions) -> None:
    ledger = Ledger({"a": 4}, {})
    ledger.begins(forward(), sessions)
    sessions.remove(11)
    ledger.stepped(ev.StepApplied((1, 2)))
    assert ledger.applied("a") == 5


def test_a_checkpoint_is_begun_before_the_step_that_carries_it_and_durable_when_written(sessions: Sessions) -> None:
    ledger = Ledger({"a": 4, "b": 4}, {})
    ledger.begins(forward(), sessions)
    ledger.stepped(ev.StepApplied((1, 2)))
    assert (ledger.begun("a"), ledger.durable("a")) == (4, 4)
    ledger.begins(forward(checkpoint=True), sessions)
    assert (ledger.begun("a"), ledger.durable("a")) == (5, 4)
    ledger.stepped(ev.StepApplied((1, 2)))
    assert (ledger.begun("a"), ledger.applied("a")) == (5, 6)
    ledger.written(CheckpointWritten({"a": 5, "b": 5}))
    assert ledger.durable("a") == 5


def test_a_published_round_is_a_checkpoint_and_its_tokens_are_spent(sessions: Sessions) -> None:
    ledger = Ledger({"a": 4}, {"a": 30})
    ledger.published()
    assert (ledger.begun("a"), ledger.round_tokens("a")) == (4, 0)


def test_a_checkpoint_has_the_answers_that_edges_may_not_have_heard(sessions: Sessions) -> None:
    ledger = Ledger({"a": 5, "b": 5}, {})
    state = State(2, 20, 0, hub_step=5, round_step=5, phase=Phase.FORWARD)
    for seat, name in ((1, "edge-a"), (2, "edge-b")):
        member = state.members[seat] = Member(seat, name, 5, contributes=True)
        member.hiddens, member.taken = {4: {0: HiddenGiven(b"x", TENSOR)}}, StepTaken(4, {0: TENSOR}, 5, False)
    state.members[2].smashed = {0: Asked(3, 5, 0, "its next step")}
    going_on = ledger.progress(state, sessions)
    assert [item.key for item in going_on.answered] == ["a"]
    assert going_on.gathered
    assert [(note.key, note.contributes, note.left) for note in going_on.members] == [
        ("a", True, False),
        ("b", True, False),
    ]
