"""Replicas of B without any process: placement, when rounds close, what is kept of each, how jobs cross over."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from blocks.layout import Layout
from blocks.surgery import LayerNames
from hub.cli import app
from hub.engine import Standing
from hub.groups import Group, Groups
from hub.jobs import EdgeAdapter, Place, StepItem
from hub.keeper import CheckpointWritten, Failure, Keeper, Progress, RoundMerged, fresh, without
from hub.ledger import Ledger
from hub.membership import MemberNote, notes_from_json
from hub.recovery import state_at
from hub.replicas import rounds
from hub.replicas.cluster import Cluster
from hub.replicas.placement import Load, place
from hub.replicas.plain import packed_item, packed_outcome, unpacked_item, unpacked_outcome
from hub.scheduler import Scheduler
from hub.scheduler import actions as act
from hub.scheduler import events as ev
from hub.scheduler.state import Member, Phase, State
from hub.store.checkpoints import Checkpoint
from hub.store.state import HubState
from messaging.errors import ErrorCode, HubError, InputError, NotFinite, ProtocolError
from messaging.messages import Recipe, Tensor

RECIPE = Recipe(1e-3, 8, 16.0, ("self_attn.q_proj",), 20, 3, 2, 1.0, 0, 0.0, 7)
NAMES = LayerNames("model.layers", 3)


def tensor_name(layer: int) -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_A.weight"


# -- placement ---------------------------------------------------------------------------------------


def test_those_who_train_are_spread_first_and_then_those_who_generate() -> None:
    loads = {0: Load(0, 3), 1: Load(0, 1), 2: Load(1, 0)}
    assert place(loads, train=True) == 1
    assert place(loads, train=False) == 2
    assert place({1: Load(2, 2), 0: Load(2, 2)}, train=True) == 0


def test_eight_edges_fill_three_groups_evenly() -> None:
    counts = dict.fromkeys(range(3), 0)
    for _ in range(8):
        counts[place({group: Load(count, 0) for group, count in counts.items()}, train=True)] += 1
    assert sorted(counts.values()) == [2, 3, 3]


# -- when a round closes --------------------------------------------------------------------------------


def group(phase: Phase, *members: Member, joint: bool = True) -> State:
    return State(cohort=2, round_steps=1, rounds=0, phase=phase, members={m.session: m for m in members}, joint=joint)


def uploaded(session: int) -> Member:
    return Member(session, f"edge-{session}", applied=1, contributes=True, upload="adapter")


def test_a_round_closes_when_all_have_uploaded_and_waits_for_nobody_where_nobody_is() -> None:
    ready, empty = group(Phase.CLOSING, uploaded(1)), group(Phase.GATHERING)
    assert rounds.may_close([ready, empty])
    assert rounds.may_close([ready, group(Phase.FORWARD, Member(2, "edge-2", silent=True))])
    assert not rounds.may_close([ready, group(Phase.FORWARD, Member(2, "edge-2"))])
    assert not rounds.may_close([ready, group(Phase.STEPPING, Member(2, "edge-2"))])
    assert not rounds.may_close([ready, group(Phase.CLOSING, replace(uploaded(2), upload=None))])
    assert not rounds.may_close([empty, group(Phase.FORWARD)])


def test_a_group_of_several_asks_to_close_only_once_it_is_told_to() -> None:
    state = group(Phase.CLOSING, replace(uploaded(1), upload=None))
    state.round_step = 1
    scheduler = Scheduler(state)
    assert scheduler.handle(ev.AdapterUploaded(1, 0, "adapter")) == []
    assert scheduler.handle(ev.RoundCloses()) == [act.CloseRound(0, 1, ("adapter",))]
    assert not [note for note in scheduler.handle(ev.RoundPublished(1)) if isinstance(note, act.Note)]
    assert (state.round, state.closes, state.phase) == (1, False, Phase.FORWARD)


def test_a_group_that_waits_for_the_others_serves_generation_meanwhile() -> None:
    state = group(Phase.CLOSING, uploaded(1))
    state.round_step = 1
    assert Scheduler(state).handle(ev.InferReceived(9, 1, "token")) == [act.RunInfer(((9, 1, "token"),))]


def test_a_group_takes_steps_again_for_edges_that_came_over() -> None:
    state = group(Phase.CLOSING, uploaded(1), replace(uploaded(2), left=True))
    state.round_step, state.awaiting, state.closes = 1, [(1, 7, 0), (2, 8, 0)], True
    state.busy = True
    actions = Scheduler(state).handle(ev.RoundReopened(steps=True))
    assert [(a.session, a.code) for a in actions if isinstance(a, act.Refuse)] == [(1, ErrorCode.BEHIND)]
    assert (state.phase, state.closes, state.awaiting) == (Phase.FORWARD, False, [(2, 8, 0)])


def test_the_cohort_may_be_whole_only_over_all_groups() -> None:
    states = [group(Phase.GATHERING), group(Phase.GATHERING, Member(1, "edge-1"))]
    scheduler = Scheduler(states[0])
    states[0].elsewhere = rounds.elsewhere(states, 0)
    scheduler.handle(ev.EdgeJoined(2, "edge-2", True))
    assert states[0].phase is Phase.FORWARD
    assert rounds.elsewhere(states, 1) == states[1].cohort
    Scheduler(states[1]).handle(ev.OthersChanged(rounds.elsewhere(states, 1)))
    assert states[1].phase is Phase.FORWARD


def test_each_group_has_a_deadline_of_its_own() -> None:
    told: list[tuple[ev.Event, int]] = []
    unused: Any = None
    all_ = [Group(number, Scheduler(group(Phase.FORWARD)), unused, 0.0) for number in range(3)]
    groups = Groups(all_, lambda event, number: told.append((event, number)))
    assert groups.next_deadline == math.inf
    all_[1].deadline, all_[2].deadline = (7.0, 4), (5.0, 9)
    assert groups.next_deadline == 5.0
    groups.pass_deadlines(6.9)
    assert told == [(ev.DeadlinePassed(9), 2)]
    groups.pass_deadlines(7.0)
    assert told[1:] == [(ev.DeadlinePassed(4), 1)]
    assert groups.next_deadline == math.inf


def test_a_group_that_goes_back_keeps_its_quorum() -> None:
    part = fresh(standing(1, 0).adapter, 3)
    assert state_at(part, replace(group(Phase.FORWARD), quorum=2)).quorum == 2


# -- what is kept of each ---------------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path: Path) -> Iterator[HubState]:
    with HubState.open(tmp_path / "state", exclusive=True) as opened:
        yield opened


def standing(value: float, tokens: int) -> Standing:
    """Of a replica that hosts layers 1 and 2."""
    tensors = {tensor_name(layer): torch.full((2, 2), value + layer) for layer in (1, 2)}
    return Standing(tensors, {"|steps": torch.tensor(int(value))}, (0, tokens, tokens))


def progress(applied: dict[str, int], round_tokens: dict[str, int]) -> Progress:
    members = tuple(MemberNote(key, (1, 0), True, False) for key in applied)
    return Progress(sum(applied.values()), 0, 3, 0, applied, round_tokens, members, True)


class Kept:
    """A keeper, and what it reported."""

    def __init__(self, state: HubState, groups: int, parts: int | None = None) -> None:
        self.reports: list[object] = []
        published = {tensor_name(layer): torch.zeros(2, 2) for layer in range(3)}
        at = [fresh(standing(0, 0).adapter, 3) for _ in range(parts or groups)]
        self.keeper = Keeper(state, RECIPE, NAMES, at, groups, published)
        self.keeper.report = self.reports.append

    def end(self) -> None:
        self.keeper.finish()
        assert not [report for report in self.reports if isinstance(report, Failure)]


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    facts = ("hub_step", "round", "round_step", "version", "applied")
    assert [getattr(one, name) for name in facts] == [getattr(other, name) for name in facts]
    assert one.extra["layer_tokens"] == other.extra["layer_tokens"]
    assert notes_from_json(one.extra["members"]) == notes_from_json(other.extra["members"])
    for mine, theirs in ((one.adapter, other.adapter), (one.optimizer, other.optimizer)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_file_holds_every_replica_as_its_group_saved_it_last(state: HubState) -> None:
    kept = Kept(state, 2)
    kept.keeper.save(0, standing(1, 10), progress({"a": 3}, {"a": 10}))
    kept.keeper.save(1, standing(2, 20), progress({"b": 4}, {"b": 20}))
    first, second = kept.keeper.part(0), kept.keeper.part(1)
    kept.end()
    assert kept.reports == [CheckpointWritten({"a": 3}, 0), CheckpointWritten({"a": 3, "b": 4}, 1)]
    loaded, warnings = state.checkpoints.load_latest()
    assert loaded is not None
    assert not warnings
    assert_same(loaded, first)
    assert_same(loaded.others[0], second)


def test_an_edge_that_moved_is_known_where_it_was_until_its_new_group_has_saved(state: HubState) -> None:
    kept = Kept(state, 2)
    kept.keeper.take(1, standing(1, 10), progress({"a": 3, "b": 5}, {"a": 10, "b": 20}))
    # a is in group 0 now, and group 1 saves first.
    kept.keeper.take(1, standing(2, 10), progress({"b": 6}, {"b": 25}))
    assert kept.keeper.applied() == {"a": 3, "b": 6}
    kept.keeper.take(0, standing(3, 10), progress({"a": 4}, {"a": 15}))
    assert kept.keeper.applied() == {"a": 4, "b": 6}
    assert kept.keeper.part(1).applied == {"b": 6}
    kept.end()


def test_a_round_is_the_token_weighted_mean_of_edges_and_replicas_and_of_those_that_are_no_more(
    state: HubState,
) -> None:
    kept = Kept(state, 2, parts=3)
    for number, (value, tokens) in enumerate([(1.0, 10), (2.0, 20)]):
        kept.keeper.deposit(number, standing(value, tokens), progress({f"edge-{number}": 1}, {}))
    # The third part is that of a replica that died: it counts as it was saved.
    kept.keeper.take(2, standing(5.0, 70), progress({"lost": 9}, {}))
    whole = {tensor_name(layer): torch.full((2, 2), 8.0) for layer in range(3)}
    uploads = tuple(EdgeAdapter(session, Place(1, 3), tokens, whole) for session, tokens in ((1, 10), (2, 20)))
    kept.keeper.close_round([act.CloseRound(0, 1, uploads[:1]), act.CloseRound(0, 1, uploads[1:])], ())
    kept.end()
    merged = kept.reports[-1]
    assert isinstance(merged, RoundMerged)
    by_hand = (1.0 * 10 + 2.0 * 20 + 5.0 * 70) / 100
    for layer, wanted in ((0, 8.0), (1, by_hand + 1), (2, by_hand + 2)):
        torch.testing.assert_close(merged.adapter[tensor_name(layer)], torch.full((2, 2), wanted))
    for number in (0, 1):
        part = kept.keeper.part(number)
        assert (part.round, part.round_step, part.version) == (1, 0, 1)
        assert part.extra["layer_tokens"] == [0, 0, 0]
        assert torch.equal(part.adapter[tensor_name(1)], merged.adapter[tensor_name(1)])
        assert int(part.optimizer["|steps"]) == number + 1
    loaded, _ = state.checkpoints.load_latest()
    assert loaded is not None
    assert len(loaded.others) == 1


def test_a_part_forgets_an_edge_and_keeps_what_it_trained() -> None:
    part = fresh(standing(1, 0).adapter, 3)
    part = replace(part, applied={"a": 1, "b": 2}, extra={**part.extra, "round_tokens": {"a": 5, "b": 6}})
    rest = without(part, {"a"})
    assert (rest.applied, rest.extra["round_tokens"]) == ({"b": 2}, {"b": 6})
    assert rest.adapter is part.adapter


def test_the_ledger_takes_one_group_back_and_leaves_the_others() -> None:
    ledger = Ledger({"a": 7, "b": 9, "new": 2}, {"a": 70, "b": 90}, {"b": 1, "new": 1})
    ledger.rewind(1, {"a": 5, "b": 4}, {"a": 50, "b": 40})
    assert [ledger.applied(key) for key in ("a", "b", "new")] == [7, 4, 0]
    assert [ledger.begun(key) for key in ("a", "b")] == [7, 4]
    assert [ledger.round_tokens(key) for key in ("a", "b")] == [70, 40]
    progress = ledger.progress(group(Phase.FORWARD), [], 1)  # type: ignore[arg-type]
    assert progress.applied == {"b": 4}


# -- to another process -------------------------------------------------------------------------------------


def test_jobs_and_answers_cross_over_as_they_are() -> None:
    tensor = Tensor("u8", (2, 3), (b"abc", memoryview(b"def")))
    item = StepItem(4, Place(1, 2), Layout.from_ints((), 2, 0, 3, 8), 5, tensor)
    assert unpacked_item(packed_item(item)).digest() == item.digest()
    back = unpacked_outcome(packed_outcome(tensor))
    assert isinstance(back, Tensor)
    assert b"".join(back.chunks) == b"abcdef"


@pytest.mark.parametrize(
    "error", [HubError(ErrorCode.CACHE_MISS, "ask again", 17), NotFinite("no number"), ProtocolError("what?")]
)
def test_errors_cross_over_as_they_are(error: Any) -> None:
    back = unpacked_outcome(packed_outcome(error))
    assert type(back) is type(error)
    assert (str(back), vars(back)) == (str(error), vars(error))


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'fedsea\[cluster\]'"):
        Cluster("127.0.0.1:1", 2)


def test_an_address_without_replicas_is_told() -> None:
    done = CliRunner().invoke(app, ["serve", "--ray", "127.0.0.1:1"])
    assert done.exit_code == 2
    assert "give --replicas too" in done.output
