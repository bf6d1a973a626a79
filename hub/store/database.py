"""The hub's SQLite file: its tables, and a connection that several threads may use."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from hub.store.files import StoreError

#: Raised whenever the tables change; a file of a newer FedSEA is left alone.
SCHEMA_VERSION = 3

#: Seconds to wait for another process that is writing.
_BUSY_S = 10.0

_SCHEMA = """
CREATE TABLE keys (
    key TEXT PRIMARY KEY,          -- Z85 public key: the one that the edge has at present
    origin TEXT NOT NULL UNIQUE,   -- the one that it enrolled with: what it did is booked under this
    name TEXT NOT NULL UNIQUE,
    enrolled_at REAL NOT NULL,     -- all times: seconds since 1970
    revoked_at REAL,
    last_seen REAL,
    left_at REAL                   -- when it said good-bye to the training; NULL if it has not, or has come back
);
CREATE TABLE tokens (
    sha256 TEXT PRIMARY KEY,       -- the token itself is kept nowhere
    uses_left INTEGER NOT NULL,
    expires_at REAL NOT NULL,
    name TEXT                      -- the only name that it enrols, if it was made for one
);
CREATE TABLE replaced (
    key TEXT PRIMARY KEY,          -- a public key that its edge has given up
    origin TEXT NOT NULL,
    replaced_at REAL NOT NULL
);
CREATE TABLE meta (
    name TEXT PRIMARY KEY,
    value TEXT NOT NULL            -- JSON
);
CREATE TABLE manifest (            -- the files that count; one that is not listed is not there
    kind TEXT NOT NULL,
    number INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    written_at REAL NOT NULL,
    note TEXT NOT NULL,            -- JSON
    PRIMARY KEY (kind, number)
);
"""

#: What makes a file of the version before into one of this version: version before -> statements.
_UPGRADES = {
    1: """
ALTER TABLE tokens ADD COLUMN name TEXT;
ALTER TABLE keys ADD COLUMN origin TEXT;
UPDATE keys SET origin = key;
CREATE TABLE replaced (key TEXT PRIMARY KEY, origin TEXT NOT NULL, replaced_at REAL NOT NULL);
""",
    2: "ALTER TABLE keys ADD COLUMN left_at REAL;",
}


class Database:
    """One connection behind one lock. A commit is on the disk when `transaction` ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        with self._mapped():
            # The lock above serves in the place of sqlite3's own check for the creating thread.
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            with self._mapped():
                self._connection.execute("PRAGMA synchronous = FULL")
                self._check_version()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, one at a time over all threads and processes, durable when it ends. Not to be nested."""
        with self._lock, self._mapped():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                # SQLite ends the transaction by itself on some errors, a full disk for one.
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Everything that a query finds."""
        with self._lock, self._mapped():
            return self._connection.execute(sql, arguments).fetchall()

    def data_version(self) -> int:
        """A number that changes whenever another connection, here or in another process, has committed."""
        with self._lock, self._mapped():
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])

    def close(self) -> None:
        """Give the file back."""
        with self._lock:
            self._connection.close()

    def _check_version(self) -> None:
        version = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StoreError(f"{self._path} was written by a newer FedSEA: update this one")
        if version == 0:
            raise StoreError(f"{self._path} has no tables yet: wait until the hub says that it is ready")
        if version < SCHEMA_VERSION:
            raise StoreError(f"{self._path} was written by an older FedSEA: start `hub serve` on it first")

    @contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"the hub's database {self._path} failed: {error}") from error


def create_database(path: Path) -> None:
    """Make the file and its tables if they are not there, or bring an older file up to date.

    Only for the holder of the state's lock.
    """
    try:
        # SQLite gives its two side files the mode of this one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        with closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version != 0:
                _upgrade(connection, version)
                return
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {SCHEMA_VERSION};COMMIT;")
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}") from error
    except sqlite3.Error as error:
        raise StoreError(f"{path} is not a database of FedSEA: {error}") from error


def _upgrade(connection: sqlite3.Connection, version: int) -> None:
    connection.execute("PRAGMA synchronous = FULL")
    for before in range(version, SCHEMA_VERSION):
        connection.executescript(f"BEGIN;{_UPGRADES[before]}PRAGMA user_version = {before + 1};COMMIT;")
