"""How much a transfer has under way, and when it is packed, by the speed of the link."""

from __future__ import annotations

import pytest

from edge.pace import Pace


class Link:
    """A link of so many bytes per second and a round trip of so many seconds, as a transfer sees it."""

    def __init__(self, speed: float, round_trip_s: float, piece: int = 1 << 20) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)
        self._speed = speed
        self._round_trip_s = round_trip_s
        self._piece = piece

    def _ask(self, asked: list[float]) -> None:
        while self.pace.more(len(asked) * self._piece, len(asked)):
            asked.append(self.now)

    def run(self, pieces: int) -> float:
        """Bytes per second over the last half of the pieces."""
        self.pace.begin()
        asked = [self.now]
        self._ask(asked)
        free, half = 0.0, 0.0
        for number in range(pieces):
            free = max(free, asked.pop(0) + self._round_trip_s) + self._piece / self._speed
            self.now = free
            self.pace.arrived(self._piece)
            self._ask(asked)
            if number == pieces // 2:
                half = self.now
        return (pieces - pieces // 2 - 1) * self._piece / (self.now - half)


@pytest.mark.parametrize("speed", [1.25e6, 12.5e6, 60e6])
@pytest.mark.parametrize("round_trip_s", [0.001, 0.05, 0.1])
def test_the_link_is_filled(speed: float, round_trip_s: float) -> None:
    assert Link(speed, round_trip_s).run(60) > 0.9 * speed


def test_little_is_under_way_on_a_slow_link() -> None:
    slow = Link(1.25e6, 0.1)
    slow.run(10)
    assert slow.pace.more(1 << 20, 1)
    assert not slow.pace.more(2 << 20, 2)


def test_a_link_is_filled_with_small_pieces_too() -> None:
    assert Link(12.5e6, 0.1, 100 << 10).run(400) > 0.9 * 12.5e6


@pytest.mark.parametrize(("speed", "slow"), [(1.25e6, True), (11e6, True), (18e6, False), (500e6, False)])
def test_only_slow_links_are_packed_for(speed: float, slow: bool) -> None:
    link = Link(speed, 0.01)
    assert link.pace.slow
    link.run(40)
    assert link.pace.slow is slow


def test_the_time_between_transfers_does_not_count() -> None:
    link = Link(500e6, 0.001)
    link.run(20)
    link.now += 3600
    link.run(4)
    assert not link.pace.slow
