"""Charge every moment of a window to one thing: what ran then, where several threads of two processes run.

A window is one token, or one training step. At any moment the foremost lane that does something is charged, in the
innermost of its calls; a moment in which no lane does anything is on its way to the lane that goes on next.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.profile.spans import WAITING, Span


@dataclass(frozen=True)
class Lane:
    """A thread as the sweep sees it; `arrival` names what passes before it goes on when nothing else runs."""

    spans: tuple[Span, ...]
    arrival: str


@dataclass(frozen=True)
class Piece:
    """A stretch of time, in nanoseconds, that one thing is charged with."""

    label: str
    begin: int
    end: int


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
    inside = [
        [piece for piece in innermost(lane.spans) if piece.end > begin and piece.begin < end] for lane in lanes
    ]
    cuts = sorted({begin, end, *(c for pieces in inside for p in pieces for c in (p.begin, p.end) if begin < c < end)})
    out: dict[str, int] = {}
    places = [0] * len(lanes)
    idle = 0
    for start, stop in zip(cuts, cuts[1:], strict=False):
        label = arrival = None
        for number, pieces in enumerate(inside):
            while places[number] < len(pieces) and pieces[places[number]].end <= start:
                places[number] += 1
            if places[number] < len(pieces) and pieces[places[number]].begin <= start:
                label, arrival = pieces[places[number]].label, lanes[number].arrival
                break
        if label is None:
            idle += stop - start
            continue
        if idle:
            out[str(arrival)] = out.get(str(arrival), 0) + idle
            idle = 0
        out[label] = out.get(label, 0) + stop - start
    if idle:
        out[lanes[0].arrival] = out.get(lanes[0].arrival, 0) + idle
    return out


def typical(windows: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """Mean milliseconds by label over the middle half of the windows by their sums: what disturbs one is left out."""
    ordered = sorted(windows, key=lambda window: sum(window.values()))
    middle = ordered[len(ordered) // 4 : max(len(ordered) - len(ordered) // 4, 1)]
    labels = dict.fromkeys(label for window in middle for label in window)
    return {label: statistics.fmean(window.get(label, 0) for window in middle) / 1e6 for label in labels}
