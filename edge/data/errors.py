"""The one error that bad data raises, and the place in a file that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from messaging.errors import InputError


class DataError(InputError, ValueError):
    """Data that cannot be used. The text names file and line, where there is one, and says what to do."""


@dataclass(frozen=True)
class Origin:
    """Where a record starts: its file and, counted from 1, its line (None: the file as a whole)."""

    path: Path
    line: int | None = None

    def error(self, text: str) -> DataError:
        """A DataError that begins with this place."""
        place = str(self.path) if self.line is None else f"{self.path}:{self.line}"
        return DataError(f"{place}: {text}")
