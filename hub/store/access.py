"""Which keys may connect, under which names, and the tokens that let new ones in."""

from __future__ import annotations

import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hub.store.database import Database
from messaging.errors import InputError, Refused
from messaging.joining import new_token, token_hash

#: How long a token is good for unless somebody says otherwise.
TOKEN_TTL_S = 600.0

#: A look-up is at most this much behind what another process has written.
POLL_S = 0.25

#: Tokens are remembered this long after they have run out, so that the refusal can say which of the two it was.
_REMEMBER_S = 30 * 86400.0

_NAME_CHARACTERS = 48

_ASK = "ask who runs the hub for a new join string (`hub invite` makes one)"


@dataclass(frozen=True)
class Edge:
    """A line of the allow-list. Times are seconds since 1970; a revoked key stays on the list for ever."""

    key: str
    name: str
    enrolled_at: float
    revoked_at: float | None
    last_seen: float | None


class AccessList:
    """The allow-list. Every method may be called from any thread.

    `name_of` answers from memory. `watch` is a connection of its own, which never waits for one that is
    writing, so that look-ups are not held up by somebody's enrolment.
    """

    def __init__(self, database: Database, watch: Database, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._watch = watch
        self._clock = clock
        self._refreshing = threading.Lock()
        #: Enrolled and not revoked: key -> name. Replaced as a whole, never changed.
        self._names: dict[str, str] = {}
        #: What the last `refresh` left; look-ups and enrolments in between must not make it miss a change.
        self._reported: dict[str, str] = {}
        self._version = -1
        self._next_poll = 0.0
        self.refresh()

    def name_of(self, key: str) -> str | None:
        """The name of an enrolled key; None for an unknown or revoked one. At most POLL_S old."""
        if time.monotonic() >= self._next_poll:
            self._poll()
        return self._names.get(key)

    def refresh(self) -> bool:
        """Look now. True if a key came or went since the last call of this, whoever noticed. For one caller."""
        self._poll()
        before, self._reported = self._reported, self._names
        return self._reported != before

    def _poll(self) -> None:
        with self._refreshing:
            self._next_poll = time.monotonic() + POLL_S
            version = self._watch.data_version()
            if version == self._version:
                return
            self._names = dict(self._watch.rows("SELECT key, name FROM keys WHERE revoked_at IS NULL"))
            # The number from before the rows: a commit in between is then seen once more, never missed.
            self._version = version

    def enrol(self, token: bytes, key: str, name: str) -> str:
        """Put `key` on the list at the price of one use of the token, and return the name it got.

        A key that is on the list already needs no token. Refused: a revoked key; a token that is unknown,
        used up or out of date.
        """
        with self._database.transaction() as db:
            known = db.execute("SELECT name, revoked_at FROM keys WHERE key = ?", (key,)).fetchone()
            if known is not None:
                if known[1] is not None:
                    raise Refused("this key was revoked at the hub: it cannot join again")
                return str(known[0])
            now = self._clock()
            _redeem(db, token, now)
            final = _unique_name(db, clean_name(name))
            db.execute("INSERT INTO keys (key, name, enrolled_at) VALUES (?, ?, ?)", (key, final, now))
        self._poll()
        return final

    def invite(self, uses: int = 1, ttl_s: float = TOKEN_TTL_S) -> bytes:
        """A new token, good for so many keys within so many seconds."""
        if uses < 1 or not ttl_s > 0:
            raise InputError("an invitation needs at least one use and some time to be used in")
        token, now = new_token(), self._clock()
        with self._database.transaction() as db:
            db.execute("DELETE FROM tokens WHERE expires_at < ?", (now - _REMEMBER_S,))
            db.execute("INSERT INTO tokens VALUES (?, ?, ?)", (token_hash(token), uses, now + ttl_s))
        return token

    def revoke(self, name: str) -> Edge:
        """Take a key off the list, for ever. InputError names the edges there are if this is none of them."""
        with self._database.transaction() as db:
            sql = "UPDATE keys SET revoked_at = coalesce(revoked_at, ?) WHERE name = ?"
            if db.execute(sql, (self._clock(), name)).rowcount == 0:
                names = [row[0] for row in db.execute("SELECT name FROM keys WHERE revoked_at IS NULL ORDER BY name")]
                raise InputError(f"no edge is called {name!r}; there are: {', '.join(names) or 'none'}")
        self._poll()
        return next(edge for edge in self.edges() if edge.name == name)

    def edges(self) -> list[Edge]:
        """Everybody who was ever enrolled, first come first."""
        sql = "SELECT key, name, enrolled_at, revoked_at, last_seen FROM keys ORDER BY enrolled_at, rowid"
        return [Edge(*row) for row in self._database.rows(sql)]

    def record_seen(self, keys: Iterable[str]) -> None:
        """These edges were heard of just now. Waits for the disk: now and then, not for every message."""
        now = self._clock()
        with self._database.transaction() as db:
            db.executemany("UPDATE keys SET last_seen = ? WHERE key = ?", [(now, key) for key in keys])


def clean_name(name: str) -> str:
    """`name` as letters, digits and . _ - only: it is shown on terminals and typed into commands."""
    normal = unicodedata.normalize("NFKC", name)
    kept = "".join(character if character.isalnum() or character in "._-" else "-" for character in normal)
    return re.sub("-+", "-", kept)[:_NAME_CHARACTERS].strip("-.") or "edge"


def _unique_name(db: sqlite3.Connection, name: str) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... that no edge has or ever had."""
    taken = {row[0] for row in db.execute("SELECT name FROM keys")}
    candidate, number = name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _redeem(db: sqlite3.Connection, token: bytes, now: float) -> None:
    """Take one use from a token, inside a transaction. Refused says what is wrong with it."""
    digest = token_hash(token)
    row = db.execute("SELECT uses_left, expires_at FROM tokens WHERE sha256 = ?", (digest,)).fetchone()
    if row is None:
        raise Refused(f"the hub does not know this join string's token: {_ASK}")
    if row[0] < 1:
        raise Refused(f"this join string is used up: {_ASK}")
    if now >= row[1]:
        raise Refused(f"this join string has expired: {_ASK}")
    db.execute("UPDATE tokens SET uses_left = uses_left - 1 WHERE sha256 = ?", (digest,))
