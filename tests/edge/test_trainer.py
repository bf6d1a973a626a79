"""What a trainer does when the hub refuses a step or the end of a round."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

import messaging.messages as m
from edge.course import Course
from edge.snapshots import Standing
from edge.trainer import Parts, Trainer
from messaging.errors import ErrorCode, HubError, LinkLost

STANDING = Standing(9, 0, 0, 9, 90, True, (), 0, "hash", "1:1")
STOPPING = HubError(ErrorCode.SHUTDOWN, "the hub is stopping")


class Client:
    """A client whose session was opened before the first step; the hub has taken nine since."""

    #: what the hub has published by now, and the round that is open
    now = (0, 0)
    adopted = True

    def __init__(self, *answers: m.AnyMessage | Exception) -> None:
        self.answers = list(answers)
        self.welcome = SimpleNamespace(applied=0, round=0, adapter_version=0)
        self.broken = False
        self.figures = SimpleNamespace(pong=None)

    def ask(self, message: m.AnyMessage, answer: type[m.AnyMessage]) -> m.AnyMessage:
        reply = self.answers.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def where(self) -> Any:
        self.welcome = SimpleNamespace(applied=9, round=self.now[1], adapter_version=self.now[0])
        if self.broken:
            raise LinkLost("the session with the hub ended before the answer came")
        return self.welcome

    def adopt(self) -> Any:
        return self.welcome


class Standings:
    """A course that notes what it is told."""

    def __init__(self) -> None:
        self.standing = STANDING
        self.resumed: list[int] = []
        self.published: list[int] = []
        self.rounds: list[int] = []
        self.losses: tuple[float, ...] | None = None

    def resume(self, welcome: Any) -> None:
        self.resumed.append(welcome.applied)

    def closes(self) -> None:
        self.standing = replace(self.standing, closes=True)

    def saved(self) -> None:
        """Nothing to write."""

    def load(self, version: int) -> None:
        self.published.append(version)

    def evaluated(self, losses: tuple[float, ...]) -> None:
        self.losses = losses

    def begin_round(self, round_: int) -> None:
        self.rounds.append(round_)


def trainer_of(client: Client, course: Standings, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    monkeypatch.setattr("edge.trainer._STOPPING_S", 0.0)
    monkeypatch.setattr(Trainer, "_upload", lambda self: None)
    log = SimpleNamespace(log=lambda text: None)
    parts = SimpleNamespace(client=client, journal=log, middle=SimpleNamespace(version=0), whole=nullcontext)
    return Trainer(cast(Parts, parts), cast(Course, course), None)


@pytest.mark.parametrize("broken", [False, True])
def test_after_a_stop_of_the_hub_a_step_goes_on_where_the_hub_stands_then(
    broken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, course = Client(), Standings()
    client.broken = broken
    trainer_of(client, course, monkeypatch)._after_refusal(STOPPING)
    # Not at step 0, where it stood when the session was opened.
    assert course.resumed == [9]


def test_after_a_stop_of_the_hub_a_round_is_closed_where_the_hub_stands_then(monkeypatch: pytest.MonkeyPatch) -> None:
    client, course = Client(STOPPING, m.Published(1, 1, 1)), Standings()
    assert trainer_of(client, course, monkeypatch)._close_round()
    assert course.resumed == [9]
    assert course.published == [1]


def test_a_held_out_loss_that_the_hub_serves_no_more_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    client, course = Client(), Standings()
    course.standing = replace(STANDING, closes=False, round_step=0, evaluated=-1)
    trainer = trainer_of(client, course, monkeypatch)

    def refused(self: Trainer, held_out: object) -> tuple[float, ...]:
        raise HubError(ErrorCode.BEHIND, "adapter version 1 is no longer served: join again")

    monkeypatch.setattr(Trainer, "_evaluate", refused)
    trainer._evaluate_when_due(lambda: [])
    assert course.losses == ()


def test_who_hears_that_training_is_over_takes_the_last_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that joined just before, and has not heard a Pong since the last round was published."""
    client, course = Client(), Standings()
    client.now = (2, 2)
    course.standing = replace(STANDING, closes=False)
    trainer = trainer_of(client, course, monkeypatch)

    def refused(self: Trainer, batch: object) -> None:
        raise HubError(ErrorCode.TRAINING_OVER, "no more rounds")

    monkeypatch.setattr(Trainer, "_step", refused)
    assert trainer._one_step(lambda number: cast(Any, None))
    assert (course.published, course.rounds) == ([2], [2])
