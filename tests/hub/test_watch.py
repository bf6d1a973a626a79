"""The hub's word on who is silent, who is back, whom the cohort waits for, and a computation that hangs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hub.figures import Figures
from hub.scheduler import actions as act
from hub.scheduler.state import Asked, Member, Phase, State
from hub.watch import Watch, laggards
from messaging.console import Journal


def session(name: str, heard_at: float, number: int = 1) -> Any:
    return SimpleNamespace(number=number, name=name, heard_at=heard_at)


class Scene:
    def __init__(self) -> None:
        self.now = 0.0
        self.lines: list[str] = []
        journal = Journal()
        journal.echo_to(lambda line: self.lines.append(line.split(" ", 1)[1]))
        self.watch = Watch(journal, lambda: self.now)
        self.figures = Figures(lambda: self.now, self.watch)
        self.state = cohort()

    def look(self, *sessions: Any) -> None:
        self.watch.look(sessions, [self.state], self.figures.overdue_s)


def cohort() -> State:
    state = State(cohort=3, round_steps=10, rounds=1)
    for at, name in enumerate(("clinic", "lawfirm", "ward"), 1):
        state.members[at] = Member(at, name)
    return state


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_silent_edge_is_told_once_within_17_seconds_and_so_is_its_return(scene: Scene) -> None:
    edge = session("ward", 0.0)
    while scene.now < 60:
        scene.look(edge)
        assert bool(scene.lines) == (scene.now > 16.0)
        scene.now += 0.5
    assert scene.lines == ["ward silent for 16 s"]
    edge.heard_at = 60.0
    scene.look(edge)
    scene.look(edge)
    assert scene.lines[1:] == ["ward is back after 1 min 00 s"]


def test_with_many_edges_pings_are_rarer_and_so_is_alarm(scene: Scene) -> None:
    scene.now = 60.0
    late = session("ward", 60.0 - 50.0, number=0)
    scene.look(late, *(session(f"edge {at}", scene.now, at) for at in range(1, 5000)))
    assert scene.lines == []


def test_a_session_that_is_closed_is_forgotten(scene: Scene) -> None:
    scene.now = 30.0
    scene.look(session("ward", 0.0))
    scene.look()
    assert scene.lines == ["ward silent for 30 s"]


@pytest.mark.parametrize("phase", [Phase.FORWARD, Phase.STEPPING, Phase.CLOSING])
def test_who_is_waited_for(phase: Phase) -> None:
    state = cohort()
    state.phase = phase
    assert laggards(state) == ()
    state.joined, state.forwards = tuple(state.members), 1
    for member in state.members.values():
        member.inside, member.contributes = 3, True
    assert laggards(state) == (), "nobody waits as long as nobody has delivered"
    for member in list(state.members.values())[:2]:
        member.smashed = member.gradients = {0: Asked(1, 3, 0, None)}
        member.upload = object()
    assert laggards(state) == ("ward",)
    state.busy = True
    assert laggards(state) == ()


def test_the_screen_says_for_whom_and_for_how_long(scene: Scene) -> None:
    scene.state.phase = Phase.FORWARD
    scene.state.members[1].smashed = {0: Asked(1, 0, 0, None)}
    for scene.now in (10.0, 12.0, 14.5):
        scene.look()
        assert scene.watch.trouble == ""
    scene.state.members[2].smashed = {0: Asked(1, 0, 0, None)}
    scene.now = 22.0
    scene.look()
    assert scene.watch.trouble == "waiting for ward since 12 s"
    scene.state.hub_step += 1
    scene.look()
    assert scene.watch.trouble == "", "another step, another wait"


def test_many_laggards_are_counted(scene: Scene) -> None:
    scene.state.phase = Phase.FORWARD
    for at in range(10):
        scene.state.members[10 + at] = Member(10 + at, f"edge {at}")
    scene.state.members[1].smashed = {0: Asked(1, 0, 0, None)}
    scene.look()
    scene.now = 6.0
    assert scene.watch.trouble == "waiting for edge 0, edge 1, edge 2 and 9 more since 6 s"


def run(scene: Scene, seconds: float, action: Any) -> None:
    scene.figures.began(action)
    scene.now += seconds
    scene.figures.ended()


def test_a_computation_is_overdue_after_ten_seconds(scene: Scene) -> None:
    assert scene.figures.overdue_s == 0.0
    scene.figures.began(act.FreeStreams(()))
    scene.now = 10.0
    assert scene.figures.overdue_s == 0.0
    scene.now = 12.0
    scene.look()
    assert scene.figures.overdue_s == 12.0
    assert scene.watch.trouble == "busy with one computation for 12 s"
    assert scene.lines == ["the computation under way takes unusually long: 12 s so far"]
    scene.figures.ended()
    scene.look()
    assert scene.lines[1:] == ["the computation is done after 12 s or more"]


def test_where_computations_always_take_long_none_is_overdue_but_one_that_takes_twice_as_long(scene: Scene) -> None:
    for _ in range(5):
        run(scene, 30.0, act.FreeStreams(()))
    run(scene, 500.0, act.FreeStreams(()))
    begun = scene.now
    scene.figures.began(act.FreeStreams(()))
    scene.now = begun + 59.0
    assert scene.figures.overdue_s == 0.0
    scene.now = begun + 61.0
    assert scene.figures.overdue_s == 61.0, "one that hung does not count as usual"
