"""What the edge's log and screen say of a silent hub, and of one that does not get on."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

import messaging.messages as m
from edge.link import LinkFigures, LinkWatch
from messaging.console import Journal


def pong(busy_s: int = 0) -> m.Pong:
    return m.Pong(1, 1, 1, 0, 0, 0, 0, 0, busy_s)


@dataclass
class Scene:
    """A watch, a clock that is turned by hand, and what the journal says."""

    now: float = 100.0
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        journal = Journal()
        journal.echo_to(lambda line: self.lines.append(line.split(" ", 1)[1]))
        self.figures = LinkFigures(heard_at=self.now)
        self.watch = LinkWatch(journal, self.figures, lambda: self.now)

    def until(self, moment: float, heard: bool) -> None:
        """Let time pass, in steps of a quarter of a second."""
        while self.now < moment:
            self.now += 0.25
            if heard:
                self.figures.heard_at = self.now
            self.watch.look(10.0)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_a_hub_that_is_heard_is_not_worth_a_word(scene: Scene) -> None:
    scene.until(200.0, heard=True)
    assert scene.lines == []
    assert scene.watch.trouble == ""


def test_silence_is_told_once_and_so_is_its_end_and_the_screen_counts(scene: Scene) -> None:
    scene.until(116.0, heard=False)
    assert scene.lines == ["hub silent for 10 s, retrying"]
    assert scene.watch.trouble == "hub silent for 16 s, retrying"
    scene.until(123.0, heard=False)
    assert scene.watch.trouble == "hub silent for 23 s, retrying"
    scene.until(123.25, heard=True)
    assert scene.lines[1:] == ["the hub answers again after 23 s"]
    assert scene.watch.trouble == ""


def test_a_long_silence_is_told_again_ever_more_seldom(scene: Scene) -> None:
    scene.until(100.0 + 3 * 3600, heard=False)
    assert scene.lines[0] == "hub silent for 10 s, retrying"
    assert 4 <= len(scene.lines) <= 9
    assert "hub silent for 3 h" in scene.watch.trouble


def test_before_the_first_look_nothing_is_wrong(scene: Scene) -> None:
    scene.now += 1000
    assert scene.watch.trouble == ""


def test_a_computation_that_hangs_is_told_and_so_is_its_end(scene: Scene) -> None:
    scene.figures.pong, scene.figures.pong_at = pong(busy_s=12), scene.now
    scene.until(104.0, heard=True)
    assert scene.lines == ["hub busy with one computation for 12 s"]
    assert scene.watch.trouble == "hub busy with one computation for 16 s"
    scene.figures.pong, scene.figures.pong_at = pong(), scene.now
    scene.until(105.0, heard=True)
    assert scene.lines[1:] == ["the hub's computation goes on after 16 s"]
    assert scene.watch.trouble == ""


def test_a_silent_hub_is_not_said_to_compute(scene: Scene) -> None:
    scene.figures.pong, scene.figures.pong_at = pong(busy_s=12), scene.now
    scene.until(112.0, heard=False)
    assert scene.watch.trouble == "hub silent for 12 s, retrying"
