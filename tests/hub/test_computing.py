from types import SimpleNamespace
from typing import Any, cast

from hub.computing import Computing
from hub.groups import Group
from hub.scheduler import actions as act


def test_the_standing_of_all_edges_is_gathered_for_what_the_keeper_takes_alone() -> None:
    told: list[tuple[str, object]] = []
    worker = SimpleNamespace(put=lambda action, progress: told.append((type(action).__name__, progress)))
    group = cast(Group, SimpleNamespace(number=0, state=None, worker=worker, closing=None))
    ledger = SimpleNamespace(begins=lambda *_: None, progress=lambda *_: "of all edges")
    nothing = cast(Any, SimpleNamespace(began=lambda *_: None))
    computing = Computing(
        nothing, nothing, nothing, nothing, nothing, cast(Any, ledger), nothing, nothing, nothing, nothing, 1.0, float
    )
    actions: tuple[act.Compute, ...] = (
        act.RunInfer(()), act.RunForward(()), act.RunForward((), checkpoint=True), act.RunBackward({}),
        act.ApplyStep(()), act.CloseRound(0, 1, ()), act.FreeStreams(()),
    )  # fmt: skip
    for action in actions:
        computing.begin(action, group)
    assert [name for name, progress in told if progress] == ["RunForward", "CloseRound"]
    assert len(told) == len(actions)
