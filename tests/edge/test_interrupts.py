"""Ctrl-C and SIGTERM in a step: the step is finished first, unless it takes too long or the user insists."""

from __future__ import annotations

import signal
import time

import pytest

from edge import interrupts as module
from edge.interrupts import Interrupts
from messaging.commands import Terminated


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_outside_of_a_step_they_raise_at_once(number: signal.Signals, kind: type[BaseException]) -> None:
    with Interrupts(), pytest.raises(kind) as raised:
        signal.raise_signal(number)
    assert type(raised.value) is kind


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_in_a_step_they_wait_for_its_end(number: signal.Signals, kind: type[BaseException]) -> None:
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.whole():
            signal.raise_signal(number)
            done.append("the step")
        done.append("more")

    with Interrupts() as interrupts, pytest.raises(kind):
        work(interrupts)
    assert done == ["the step"]


def test_the_second_one_does_not_wait() -> None:
    done = []

    def work(interrupts: Interrupts) -> None:
        with interrupts.whole():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append("the step")

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert done == []


def test_a_step_that_hangs_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 1)

    def work(interrupts: Interrupts) -> None:
        with interrupts.whole():
            signal.raise_signal(signal.SIGINT)
            time.sleep(20)

    started = time.monotonic()
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        work(interrupts)
    assert time.monotonic() - started < 10


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    with Interrupts():
        assert signal.getsignal(signal.SIGTERM) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before
