"""Which keys may connect, under which names, and the tokens that let new ones in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hub.store.audit import AuditLog
from hub.store.database import Database
from hub.store.invitations import (
    ASK,
    SHOWN,
    Invitation,
    check_invited,
    clean_name,
    redeem,
    shown,
    taken,
    unique_name,
)
from messaging.errors import InputError, Refused
from messaging.joining import new_token, token_hash
from messaging.keys import is_key

#: How long a token is good for unless somebody says otherwise.
TOKEN_TTL_S = 600.0

#: A look-up is at most this much behind what another process has written.
POLL_S = 0.25

#: Tokens are remembered this long after they have run out, so that the refusal can say which of the two it was.
_REMEMBER_S = 30 * 86400.0

#: An invitation is for people who are about to join.
_LONGEST_TTL_S = 365 * 86400.0

_REVOKED = (
    "this edge's key was revoked at the hub and cannot come back: if that was a mistake, "
    "ask who runs the hub for a new join string, and join with another --state"
)
_REPLACED = (
    "this key was replaced by a newer one of the same edge (`edge rotate-key`): use the state with the newer key"
)


@dataclass(frozen=True)
class Edge:
    """A line of the allow-list. Times are seconds since 1970; a revoked key stays on the list for ever."""

    key: str
    name: str
    enrolled_at: float
    revoked_at: float | None
    last_seen: float | None


class AccessList:
    """The allow-list. Every method may be called from any thread. What changes it is told to `audit`.

    `name_of` answers from memory. `watch` is a connection of its own, which never waits for one that is
    writing, so that look-ups are not held up by somebody's enrolment.
    """

    def __init__(
        self, database: Database, watch: Database, audit: AuditLog, clock: Callable[[], float] = time.time
    ) -> None:
        self._database = database
        self._watch = watch
        self._audit = audit
        self._clock = clock
        self._refreshing = threading.Lock()
        #: Enrolled and not revoked: key -> name. Replaced as a whole, never changed.
        self._names: dict[str, str] = {}
        #: Keys that were on the list -> why they are no more.
        self._gone: dict[str, str] = {}
        #: Present key -> the key that the edge enrolled with.
        self._origins: dict[str, str] = {}
        #: The key that an edge enrolled with -> its name and its present key.
        self._by_origin: dict[str, tuple[str, str]] = {}
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

    def standing(self, key: str) -> str:
        """What a key is to the hub: 'enrolled', 'revoked', 'replaced' or 'unknown'."""
        return "enrolled" if key in self._names else self._gone.get(key, "unknown")

    def why_not(self, key: str) -> str:
        """Why a key may not connect, in words for whoever has it."""
        unknown = f"the hub does not know this edge's key: {ASK}"
        return {"revoked": _REVOKED, "replaced": _REPLACED}.get(self._gone.get(key, ""), unknown)

    def origin_of(self, key: str) -> str:
        """The key that the edge with the present key `key` enrolled with: it outlives every replacement.

        What an edge did is booked under it. An unknown or revoked key is its own origin.
        """
        return self._origins.get(key, key)

    def name_by_origin(self, origin: str) -> str | None:
        """The name of the edge that enrolled with the key `origin`, whatever its key is by now; None if revoked."""
        return self._by_origin.get(origin, (None, ""))[0]

    def present_key(self, origin: str) -> str:
        """The key that the edge that enrolled with `origin` has by now; `origin` itself if it may not connect."""
        return self._by_origin.get(origin, ("", origin))[1]

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
            revoked = self._watch.rows("SELECT key FROM keys WHERE revoked_at IS NOT NULL")
            replaced = self._watch.rows("SELECT key FROM replaced")
            self._gone = {row[0]: "revoked" for row in revoked} | {row[0]: "replaced" for row in replaced}
            rows = self._watch.rows("SELECT key, name, origin FROM keys WHERE revoked_at IS NULL")
            self._origins = {key: origin for key, _, origin in rows}
            self._by_origin = {origin: (name, key) for key, name, origin in rows}
            self._names = {key: name for key, name, _ in rows}
            # The number from before the rows: a commit in between is then seen once more, never missed.
            self._version = version

    def enrol(self, token: bytes, key: str, name: str, address: str = "") -> str:
        """Put `key` on the list at the price of one use of the token, and return the name it got.

        A key that is on the list already needs no token. Refused: a key that was revoked or replaced; a token
        that is unknown, used up or out of date.
        """
        try:
            final, by = self._enrol(token, key, name)
        except Refused as refused:
            reason = f"with {shown(token)}: {refused}"
            self._audit.write_often("enrolment refused", name=clean_name(name), key=key, address=address, reason=reason)
            raise
        if by is not None:
            self._audit.write("enrolled", name=final, key=key, address=address, reason=f"with {by}")
        self._poll()
        return final

    def _enrol(self, token: bytes, key: str, name: str) -> tuple[str, str | None]:
        """The name, and the token that it cost; None if the key is on the list already."""
        with self._database.transaction() as db:
            known = db.execute("SELECT name, revoked_at FROM keys WHERE key = ?", (key,)).fetchone()
            if known is not None:
                if known[1] is not None:
                    raise Refused(_REVOKED)
                return str(known[0]), None
            if db.execute("SELECT 1 FROM replaced WHERE key = ?", (key,)).fetchone():
                raise Refused(_REPLACED)
            now = self._clock()
            reserved = redeem(db, token, now)
            if reserved is None:
                final = unique_name(db, clean_name(name), now)
            elif reserved in taken(db):
                raise Refused(f"this join string is for the name {reserved!r}, which is taken by now: {ASK}")
            else:
                final = reserved
            sql = "INSERT INTO keys (key, origin, name, enrolled_at) VALUES (?, ?, ?, ?)"
            db.execute(sql, (key, key, final, now))
        return final, shown(token)

    def invite(self, uses: int = 1, ttl_s: float = TOKEN_TTL_S, name: str | None = None) -> bytes:
        """A new token, good for so many keys within so many seconds.

        With `name` it is good for one key, which gets that name. InputError: no uses, no time or more than a
        year, a name that is taken or that cannot be one.
        """
        if uses < 1 or not 0 < ttl_s <= _LONGEST_TTL_S:
            raise InputError("an invitation needs at least one use, and some time to be used in, a year at most")
        if name is not None:
            check_invited(name, uses)
        token, now = new_token(), self._clock()
        with self._database.transaction() as db:
            db.execute("DELETE FROM tokens WHERE expires_at < ?", (now - _REMEMBER_S,))
            if name is not None and name in taken(db):
                raise InputError(f"an edge has, or had, the name {name!r}: choose another for the new one")
            db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?)", (token_hash(token), uses, now + ttl_s, name))
        reason = f"{shown(token)}, good for {uses} within {ttl_s:g} s"
        self._audit.write("invitation made", name=name or "", reason=reason)
        return token

    def invitations(self) -> list[Invitation]:
        """The tokens that are still good for something, the one that runs out first at the head."""
        sql = (
            "SELECT substr(sha256, 1, ?), uses_left, expires_at, name FROM tokens "
            "WHERE uses_left > 0 AND expires_at > ? ORDER BY expires_at"
        )
        return [Invitation(*row) for row in self._database.rows(sql, SHOWN, self._clock())]

    def revoke(self, name: str) -> Edge:
        """Take a key off the list, for ever. InputError names the edges there are if this is none of them."""
        with self._database.transaction() as db:
            known = db.execute("SELECT key, revoked_at FROM keys WHERE name = ?", (name,)).fetchone()
            if known is None:
                names = [row[0] for row in db.execute("SELECT name FROM keys WHERE revoked_at IS NULL ORDER BY name")]
                raise InputError(f"no edge is called {name!r}; there are: {', '.join(names) or 'none'}")
            if known[1] is None:
                db.execute("UPDATE keys SET revoked_at = ? WHERE name = ?", (self._clock(), name))
        if known[1] is None:
            self._audit.write("revoked", name=name, key=known[0])
        self._poll()
        return next(edge for edge in self.edges() if edge.name == name)

    def replace(self, origin: str, successor: str, address: str = "") -> str:
        """Put `successor` in the place of the present key of an edge, which is good no more; the edge's name.

        All of it or nothing is on the disk on return. Refused: the edge is not on the list, or `successor` is no
        key, or is or was somebody's.
        """
        with self._database.transaction() as db:
            sql = "SELECT name, key FROM keys WHERE origin = ? AND revoked_at IS NULL"
            known = db.execute(sql, (origin,)).fetchone()
            if known is None:
                raise Refused("only an edge that is enrolled can replace its key")
            sql = "SELECT 1 FROM keys WHERE key = :key UNION SELECT 1 FROM replaced WHERE key = :key"
            if not is_key(successor) or db.execute(sql, {"key": successor}).fetchone():
                raise Refused("the new key is none, or has been in use: make another with `edge rotate-key`")
            db.execute("UPDATE keys SET key = ? WHERE origin = ?", (successor, origin))
            db.execute("INSERT INTO replaced VALUES (?, ?, ?)", (known[1], origin, self._clock()))
        self._audit.write("key replaced", name=known[0], key=successor, address=address, reason=f"it was {known[1]}")
        self._poll()
        return str(known[0])

    def edges(self) -> list[Edge]:
        """Everybody who was ever enrolled, first come first."""
        sql = "SELECT key, name, enrolled_at, revoked_at, last_seen FROM keys ORDER BY enrolled_at, rowid"
        return [Edge(*row) for row in self._database.rows(sql)]

    def note_cut_off(self, reason: str, key: str | None, address: str) -> None:
        """Have it in the audit log that a connection was cut off; `key` and `address` as far as they are known."""
        name, group = (self.name_of(key) or "", key) if key else ("", "")
        self._audit.write_often("cut off", group=group, name=name, key=group, address=address, reason=reason)

    def record_seen(self, origins: Iterable[str]) -> None:
        """These edges, by their origins, were heard of just now. Waits for the disk: not for every message."""
        now = self._clock()
        with self._database.transaction() as db:
            db.executemany("UPDATE keys SET last_seen = ? WHERE origin = ?", [(now, origin) for origin in origins])

    def note_left(self, origin: str) -> None:
        """An edge has said good-bye to the training: on the disk on return."""
        with self._database.transaction() as db:
            db.execute("UPDATE keys SET left_at = ? WHERE origin = ?", (self._clock(), origin))

    def note_back(self, origin: str) -> None:
        """An edge that may have left trains again: on the disk on return."""
        if self._database.rows("SELECT 1 FROM keys WHERE origin = ? AND left_at IS NOT NULL", origin):
            with self._database.transaction() as db:
                db.execute("UPDATE keys SET left_at = NULL WHERE origin = ?", (origin,))

    def left(self) -> set[str]:
        """The edges, by their origins, that have left the training and not come back."""
        return {row[0] for row in self._database.rows("SELECT origin FROM keys WHERE left_at IS NOT NULL")}
