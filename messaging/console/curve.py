"""A curve of bounded size, however long the run."""

from __future__ import annotations


class Curve:
    """Keeps at most `capacity` points of a growing series; each is the mean of equally many neighbours.

    When it is full, pairs of neighbours merge, so that its size and the cost of a look at it never grow.
    """

    def __init__(self, capacity: int = 256) -> None:
        if capacity < 2 or capacity % 2:
            raise ValueError(f"capacity must be even and at least 2, not {capacity}")
        self._capacity = capacity
        self._points: list[float] = []
        #: How many values make one point, and those of the point that is not complete.
        self._per_point = 1
        self._open: list[float] = []

    def add(self, value: float) -> None:
        """Append the next value of the series."""
        self._open.append(value)
        if len(self._open) < self._per_point:
            return
        self._points.append(_mean(self._open))
        self._open = []
        if len(self._points) == self._capacity:
            # A new list, never a change in place: `points` may be reading the old one in another thread.
            self._points = [_mean(self._points[at : at + 2]) for at in range(0, self._capacity, 2)]
            self._per_point *= 2

    def points(self) -> tuple[float, ...]:
        """The complete points, oldest first."""
        return tuple(self._points)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
