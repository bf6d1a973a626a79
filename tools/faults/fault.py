"""What an experiment of the fault bench is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tools.table import Row, Skipped


@dataclass(frozen=True)
class Setting:
    """How an experiment is run: in a folder of its own; `quick` takes seconds and is what the tests run."""

    folder: Path
    console: Console
    quick: bool

    def count(self, whole: int, quick: int) -> int:
        """How often to repeat something."""
        return quick if self.quick else whole

    def limit(self, whole: float, quick: float) -> float:
        """The most that a figure may be. A quick run, which may share its cores, sees whether it happens at all."""
        return quick if self.quick else whole


@dataclass(frozen=True)
class Fault:
    """One experiment. `name` is what `--rows` takes: a number of the table in SECURITY.md, or a word.

    `rows` are the rows that `run` has to fill, measured or skipped with a reason.
    """

    name: str
    title: str
    rows: tuple[str, ...]
    run: Callable[[Setting], Sequence[Row | Skipped]]
