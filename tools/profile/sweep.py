"""Charge every moment of a window to one thing: what ran then, where several threads of two processes run.

A window is one token, or one training step. At any moment the foremost lane that does something is charged, in the
innermost of its calls; a moment in which no lane does anything is on its way to the lane that goes on next.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tools.profile.spans import WAITING, Span


@dataclass(frozen=True)
class Piece:
    """A stretch of time, in nanoseconds, that one thing is charged with."""

    label: str
    begin: int
    end: int


@dataclass(frozen=True)
class Lane:
    """A thread: its pieces in order, and what passes before it goes on when nothing else runs."""

    pieces: list[Piece]
    arrival: str

    def between(self, begin: int, end: int) -> list[Piece]:
        """The pieces that reach into a window."""
        first = bisect_right(self.pieces, begin, key=lambda piece: piece.end)
        last = bisect_left(self.pieces, end, key=lambda piece: piece.begin)
        return self.pieces[first:last]


def innermost(spans: Sequence[Span]) -> list[Piece]:
    """A thread's nested calls as pieces that do not overlap; what waits gives none."""
    pieces: list[Piece] = []
    open_: list[Span] = []
    at = 0

    def until(moment: int) -> None:
        nonlocal at
        if open_ and open_[-1].label != WAITING and moment > at:
            pieces.append(Piece(open_[-1].label, at, moment))
        at = max(at, moment)

    for span in sorted(spans, key=lambda span: (span.begin, -span.end)):
        while open_ and open_[-1].end <= span.begin:
            until(open_[-1].end)
            open_.pop()
        until(span.begin)
        open_.append(span)
    while open_:
        until(open_[-1].end)
        open_.pop()
    return pieces


def charge(lanes: Sequence[Lane], begin: int, end: int) -> dict[str, int]:
    """Nanoseconds by label between `begin` and `end`; they sum to the window. The foremost lane comes first."""
    inside = [lane.between(begin, end) for lane in lanes]
    moments = {moment for pieces in inside for piece in pieces for moment in (piece.begin, piece.end)}
    cuts = [begin, *sorted(moment for moment in moments if begin < moment < end), end]
    out: dict[str, int] = {}
    idle = 0
    for start, stop in pairwise(cuts):
        running = _foremost(inside, start)
        if running is None:
            idle += stop - start
            continue
        number, label = running
        for name, took in ((lanes[number].arrival, idle), (label, stop - start)):
            if took:
                out[name] = out.get(name, 0) + took
        idle = 0
    if idle:
        out[lanes[0].arrival] = out.get(lanes[0].arrival, 0) + idle
    return out


def _foremost(inside: Sequence[list[Piece]], moment: int) -> tuple[int, str] | None:
    """Which lane does something at a moment, and what. Drops pieces that are over: moments must not go back."""
    for number, pieces in enumerate(inside):
        while pieces and pieces[0].end <= moment:
            pieces.pop(0)
        if pieces and pieces[0].begin <= moment:
            return number, pieces[0].label
    return None


def undisturbed(windows: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Mean milliseconds by label over the quarter of the windows that took the least.

    What else ran on the machine made the others longer; it is not what a profile is to show.
    """
    ordered = sorted(windows, key=lambda window: sum(window.values()))
    quickest = ordered[: max(len(ordered) // 4, 1)]
    labels = dict.fromkeys(label for window in quickest for label in window)
    return {label: statistics.fmean(window.get(label, 0) for window in quickest) / 1e6 for label in labels}
