"""The profile as a text of bars, for the terminal and as an SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from tools.profile.run import Profile

WIDTH = 110
_NAME, _BAR = 46, 48
#: Below this share of the whole, parts are shown together.
_LEAST = 0.004
_COLOURS = {"edge": "green", "link": "yellow", "hub": "blue"}
_EIGHTHS = " ▏▎▍▌▋▊▉"


def draw(profile: Profile) -> Text:
    """Everything that was measured: a block of bars for the token and one for the step."""
    text = Text()
    for title, parts in (("one decoded token", profile.token), ("one training step, in one piece", profile.step)):
        _block(text, f"{title}, {sum(parts.values()):.1f} ms", parts)
    return text


def svg(view: Text) -> str:
    """The view as an SVG that loads nothing."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(view)
    drawn = console.export_svg(
        title="where the time goes: hidden 512, 16 layers, one thread a side", unique_id="profile"
    )
    # rich's picture loads its font from the network; whoever looks at it has a monospace font of their own.
    return re.sub(r"\s*@font-face\s*{[^}]*}", "", drawn)


def _block(text: Text, title: str, parts: Mapping[str, float]) -> None:
    whole = sum(parts.values())
    text.append(f"{title}\n", "bold")
    sides = {side: sum(ms for label, ms in parts.items() if label.startswith(f"{side}:")) for side in _COLOURS}
    for side, ms in sides.items():
        text.append("█" * round(ms / whole * (WIDTH - 10)), _COLOURS[side])
    text.append("\n")
    for side, ms in sides.items():
        text.append(f"{side} {ms:.1f} ms, {ms / whole:.0%}   ", _COLOURS[side])
    text.append("\n\n")
    for side in _COLOURS:
        mine = {label: ms for label, ms in parts.items() if label.startswith(f"{side}:")}
        small = sum(ms for ms in mine.values() if ms < _LEAST * whole)
        shown = sorted(((ms, label) for label, ms in mine.items() if ms >= _LEAST * whole), reverse=True)
        for ms, label in [*shown, (small, f"{side}: all else")]:
            _line(text, label, ms, whole, _COLOURS[side])
    text.append("\n")


def _line(text: Text, label: str, ms: float, whole: float, colour: str) -> None:
    eighths = round(ms / whole * _BAR * 8)
    bar = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    text.append(f"{label[:_NAME]:<{_NAME}} {ms:9.2f} ms  ")
    text.append(f"{bar}\n", colour)
