"""Figures as people read them. Pure strings: no terminal, no colour."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

#: What stands for a figure that is not known (yet).
UNKNOWN = "-"
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_LEVELS = "▁▂▃▄▅▆▇█"
#: Stands in a sparkline for a value that is not finite.
_NOT_FINITE = "×"


def number(value: float | None) -> str:
    """About three digits, with thousands separated: 0.042, 4.25, 42.3, 1,234."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    size = abs(value)
    if size >= 99.95:
        return f"{value:,.0f}"
    if size >= 9.995:
        return f"{value:.1f}"
    if size >= 0.0995 or size == 0:
        return f"{value:.2f}"
    return f"{value:.3f}" if size >= 0.00095 else f"{value:.1e}"


def loss_text(value: float | None) -> str:
    """A loss, always with three decimals; one that is not a number is said to be none."""
    return UNKNOWN if value is None else f"{value:.3f}"


def human_bytes(count: float | None) -> str:
    """A count of bytes in binary units: 512 B, 9.5 KiB, 120 MiB."""
    if count is None:
        return UNKNOWN
    value = float(count)
    for unit in _BYTE_UNITS:
        text = f"{value:.0f}" if unit == "B" or value >= 99.95 else f"{value:.1f}"
        if float(text) < 1024 or unit == _BYTE_UNITS[-1]:
            return f"{text} {unit}"
        value /= 1024
    raise AssertionError("the last unit takes any value")


def byte_rate(per_second: float | None) -> str:
    """Bytes per second."""
    return UNKNOWN if per_second is None else f"{human_bytes(per_second)}/s"


def milliseconds(value: float | None) -> str:
    """A short time given in milliseconds: 0.4 ms, 12 ms, 1.3 s."""
    if value is None or not math.isfinite(value):
        return UNKNOWN
    if value < 9.95:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 999.5 else f"{value / 1000:.1f} s"


def duration(seconds: float | None) -> str:
    """A time of seconds to days, in at most two units: 42 s, 3 min 05 s, 2 h 13 min, 3 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    whole = max(0, round(seconds))
    minutes, left_s = divmod(whole, 60)
    hours, left_min = divmod(minutes, 60)
    days, left_h = divmod(hours, 24)
    if days:
        return f"{days} d {left_h} h"
    if hours:
        return f"{hours} h {left_min:02d} min"
    return f"{minutes} min {left_s:02d} s" if minutes else f"{left_s} s"


def of_total(done: int, total: int | None) -> str:
    """Progress as 13/20, or 13 where there is no total."""
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def percent(fraction: float) -> str:
    """A share of a whole, in whole percent."""
    return f"{100 * fraction:.0f}%"


def shares(parts: Sequence[float]) -> list[float]:
    """Each part's share of their sum; all zero where there is nothing to share. Negative parts count as zero."""
    kept = [max(0.0, part) for part in parts]
    total = sum(kept)
    return [part / total if total > 0 else 0.0 for part in kept]


def split_cells(fractions: Sequence[float], width: int) -> list[int]:
    """Whole cells for shares that sum to 1, `width` in all, by largest remainder."""
    exact = [fraction * width for fraction in fractions]
    cells = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda at: cells[at] - exact[at])
    for at in by_remainder[: width - sum(cells) if any(fractions) else 0]:
        cells[at] += 1
    return cells


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of at most `width` bars, lowest to highest; more values than bars are averaged."""
    points = _resample(values, width)
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return _NOT_FINITE * len(points)
    low, span = min(finite), max(finite) - min(finite)
    return "".join(_level(point, low, span) for point in points)


def _level(value: float, low: float, span: float) -> str:
    if not math.isfinite(value):
        return _NOT_FINITE
    if span == 0:
        return _LEVELS[len(_LEVELS) // 2]
    return _LEVELS[min(len(_LEVELS) - 1, int((value - low) / span * len(_LEVELS)))]


def _resample(values: Sequence[float], width: int) -> list[float]:
    """At most `width` means of neighbouring values."""
    if len(values) <= width:
        return list(values)
    if width <= 0:
        return []
    edges = [len(values) * at // width for at in range(width + 1)]
    return [sum(values[start:stop]) / (stop - start) for start, stop in itertools.pairwise(edges)]


def printable(text: str) -> str:
    """The text on one line and without control characters.

    Names and errors come from the other side of the wire; an escape sequence in one would steer this terminal.
    """
    return "".join(character if character.isprintable() else " " for character in text)


def joined(parts: Iterable[str]) -> str:
    """The parts of a plain line that have something to say."""
    return "  ".join(part for part in parts if part)
