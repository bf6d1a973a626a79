"""Numbered files of one kind, listed in the database: the list says which files count, and what is in them."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.store.database import Database
from hub.store.files import atomic_file, make_private_folder, sweep_temporaries


@dataclass(frozen=True)
class Entry:
    """A file that is listed: its sha256 and size as they were written, and what is worth knowing without opening it."""

    number: int
    path: Path
    sha256: str
    bytes: int
    written_at: float
    note: dict[str, Any]


class Series:
    """The files `{stem}{number}.safetensors` of a folder.

    A file is complete under its name first and listed second, so a listed file is whole unless the disk
    spoiled it, and `fault` tells when it did.
    """

    def __init__(self, database: Database, folder: Path, stem: str, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._folder = folder
        self._stem = stem
        self._clock = clock

    def entries(self) -> list[Entry]:
        """All that is listed, newest first."""
        sql = "SELECT number, sha256, bytes, written_at, note FROM manifest WHERE kind = ? ORDER BY number DESC"
        return [
            Entry(number, self.path(number), sha256, size, written_at, json.loads(note))
            for number, sha256, size, written_at, note in self._database.rows(sql, self._stem)
        ]

    def path(self, number: int) -> Path:
        """Where the file of this number stands."""
        return self._folder / f"{self._stem}{number}.safetensors"

    def add(self, number: int, write: Callable[[Path], None], note: dict[str, Any]) -> Entry:
        """Have `write` make file `number`, replacing an old one, and list it. Durable on return."""
        make_private_folder(self._folder)
        with atomic_file(self.path(number)) as temporary:
            write(temporary)
            digest, size = _digest(temporary), temporary.stat().st_size
            # From here to the insertion the old entry does not fit the file: better none than a false alarm.
            self._unlist([number])
        now = self._clock()
        with self._database.transaction() as db:
            row = (self._stem, number, digest, size, now, json.dumps(note))
            db.execute("INSERT INTO manifest VALUES (?, ?, ?, ?, ?, ?)", row)
        return Entry(number, self.path(number), digest, size, now, note)

    def drop(self, numbers: Collection[int]) -> None:
        """Take files off the list, then off the disk; what cannot be removed now, `sweep` removes."""
        if numbers:
            self._unlist(numbers)
        for number in numbers:
            with suppress(OSError):
                self.path(number).unlink()

    def sweep(self) -> None:
        """Remove what killed writers left: temporary files, and files that were taken off the list and not removed.

        Unlisted files with a number above the newest listed one are left alone: their number will be written
        again, and if the database is an old copy they may be all that is left of somebody's work.
        """
        if not self._folder.is_dir():
            return
        sweep_temporaries(self._folder)
        listed = {entry.number for entry in self.entries()}
        for path in self._folder.iterdir():
            match = re.fullmatch(rf"{re.escape(self._stem)}(\d+)\.safetensors", path.name)
            if match and int(match[1]) not in listed and int(match[1]) < max(listed, default=0):
                path.unlink()

    def _unlist(self, numbers: Collection[int]) -> None:
        with self._database.transaction() as db:
            sql = "DELETE FROM manifest WHERE kind = ? AND number = ?"
            db.executemany(sql, [(self._stem, number) for number in numbers])


def fault(path: Path, sha256: str, size: int) -> str | None:
    """What is wrong with a file that was listed with this hash and size; None if it is as it was written."""
    try:
        if path.stat().st_size != size:
            return "is not as long as it was written"
        if _digest(path) != sha256:
            return "is not what was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
