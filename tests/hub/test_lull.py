"""When pings may gather."""

from __future__ import annotations

from hub.lull import Lull

MANY = 1000


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_only_many_edges_with_nothing_to_say_let_the_hub_rest() -> None:
    clock = Clock()
    lull = Lull(clock)
    assert lull.rest_s(MANY) == 0
    clock.now += 1.0
    assert 0 < lull.rest_s(MANY) <= 0.05
    assert lull.rest_s(100) == 0


def test_whatever_else_comes_ends_it() -> None:
    clock = Clock()
    lull = Lull(clock)
    clock.now += 60.0
    assert lull.rest_s(MANY) > 0
    lull.disturb()
    clock.now += 0.9
    assert lull.rest_s(MANY) == 0
    clock.now += 0.2
    assert lull.rest_s(MANY) > 0
