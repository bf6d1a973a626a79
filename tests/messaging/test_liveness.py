"""Pings and death: three misses, within 21 seconds, and not because this machine slept."""

from __future__ import annotations

import random

import pytest

from messaging.liveness import Liveness


def run(liveness: Liveness, start: float, stop: float, answered: bool) -> tuple[int, float | None]:
    """Pings sent between two times, and when death was noticed, in steps of 0.1 s."""
    pings, now = 0, start
    while now < stop:
        if liveness.dead(now):
            return pings, now
        if liveness.ping_due(now):
            liveness.pinged(now)
            pings += 1
            if answered:
                liveness.heard()
        now += 0.1
    return pings, None


@pytest.mark.parametrize("seed", range(20))
def test_death_within_21_seconds(seed: int) -> None:
    liveness = Liveness(random.Random(seed), 0.0)
    assert run(liveness, 0.0, 100.0, answered=True)[1] is None
    pings, died = run(liveness, 100.0, 200.0, answered=False)
    assert pings == 3
    assert died is not None
    assert 11 < died - 100 < 21


def test_any_traffic_counts() -> None:
    liveness = Liveness(random.Random(1), 0.0)
    for second in range(100):
        if liveness.ping_due(second):
            liveness.pinged(second)
        if second % 9 == 8:
            liveness.heard()
        assert not liveness.dead(second)


def test_more_edges_ping_less_often() -> None:
    few, many = Liveness(random.Random(2), 0.0), Liveness(random.Random(2), 0.0)
    many.resize(5000)
    assert 120 <= run(few, 0.0, 600.0, answered=True)[0] <= 160
    assert 23 <= run(many, 0.0, 600.0, answered=True)[0] <= 32
    assert many.next_event() <= 600 + 26


def test_pings_after_the_third_do_not_put_death_off() -> None:
    liveness = Liveness(random.Random(5), 0.0)
    for second in range(30):
        if liveness.ping_due(second):
            liveness.pinged(second)
    assert liveness.dead(20)


def test_a_sleeping_machine_does_not_declare_the_hub_dead() -> None:
    liveness = Liveness(random.Random(3), 0.0)
    liveness.pinged(0.0)
    liveness.heard()
    assert not liveness.dead(10_000.0)
    assert liveness.ping_due(10_000.0)


def test_a_new_connection_starts_afresh() -> None:
    liveness = Liveness(random.Random(4), 0.0)
    _, died = run(liveness, 0.0, 100.0, answered=False)
    assert died is not None
    liveness.restart(died)
    assert not liveness.dead(died)
    assert liveness.ping_due(died)
