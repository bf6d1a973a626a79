"""The table of a bench: rows {row, figure, target, met}, what was skipped, and what must not be missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Row:
    """One figure; `target` says in words what it has to be, `met` whether it is (None: no target)."""

    row: str
    figure: float
    target: str | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that this machine cannot measure, and why."""

    row: str
    reason: str


def at_least(row: str, figure: float, least: float) -> Row:
    """A row that is met from `least` on."""
    return Row(row, round(figure, 3), f">= {least:g}", figure >= least)


def at_most(row: str, figure: float, most: float, unit: str = "") -> Row:
    """A row that is met up to `most`."""
    return Row(row, round(figure, 4), f"<= {most:g}{unit}", figure <= most)


def reported(row: str, figure: float) -> Row:
    """A row without a target."""
    return Row(row, round(figure, 3))


@dataclass
class Table:
    """All that was measured; `required` names the rows that have to be there, measured or skipped."""

    title: str
    required: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    conditions: dict[str, object] = field(default_factory=dict)

    def add(self, *items: Row | Skipped) -> None:
        """Note rows, measured or skipped."""
        for item in items:
            if isinstance(item, Row):
                self.rows.append(item)
            else:
                self.skipped.append(item)

    def missing(self) -> list[str]:
        """Required rows that were neither measured nor skipped."""
        known = {*(row.row for row in self.rows), *(skipped.row for skipped in self.skipped)}
        return [name for name in self.required if name not in known]

    def write(self, path: Path) -> None:
        """The table as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        content: Mapping[str, object] = {
            "rows": [asdict(row) for row in self.rows],
            "skipped": [asdict(item) for item in self.skipped],
            "missing": self.missing(),
            "conditions": self.conditions,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")

    def show(self, console: Console) -> None:
        """Print it."""
        shown = RichTable(title=self.title)
        for name, justify in (("row", "left"), ("figure", "right"), ("target", "right"), ("met", "left")):
            shown.add_column(name, justify=justify)  # type: ignore[arg-type]
        for row in self.rows:
            met = {True: "[green]yes[/]", False: "[red]no[/]", None: ""}[row.met]
            shown.add_row(row.row, f"{row.figure:g}", row.target or "", met)
        console.print(shown)
        _list(console, "skipped", (f"{item.row}: {item.reason}" for item in self.skipped))
        _list(console, "[red]missing[/]", self.missing())


def _list(console: Console, title: str, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(f"{title}: {line}")
