"""Tokens that let new edges in, and the names that edges get. What takes a `db` runs inside its transaction."""

from __future__ import annotations

import hmac
import re
import sqlite3
import unicodedata
from dataclasses import dataclass

from messaging.errors import InputError, Refused
from messaging.joining import token_hash

#: Characters of a token's sha256 that name it in the audit log and in lists.
SHOWN = 8

_NAME_CHARACTERS = 48

#: What somebody who is refused can do.
ASK = "ask who runs the hub for a new join string (`hub invite` makes one)"


@dataclass(frozen=True)
class Invitation:
    """A token that is still good: the beginning of its sha256, for how many keys, until when, for which name."""

    token_sha256: str
    uses_left: int
    expires_at: float
    name: str | None


def clean_name(name: str) -> str:
    """`name` as letters, digits and . _ - only: it is shown on terminals and typed into commands."""
    normal = unicodedata.normalize("NFKC", name)
    kept = "".join(character if character.isalnum() or character in "._-" else "-" for character in normal)
    return re.sub("-+", "-", kept)[:_NAME_CHARACTERS].strip("-.") or "edge"


def check_invited(name: str, uses: int) -> None:
    """InputError if nobody can be invited under this name, so many times."""
    if uses != 1:
        raise InputError("an invitation with a name is for one edge: leave the number of uses out")
    if clean_name(name) != name:
        raise InputError(
            f"{name!r} cannot be an edge's name: letters, digits and . _ - make one, as {clean_name(name)!r}"
        )


def taken(db: sqlite3.Connection) -> set[str]:
    """Names that an edge has or ever had."""
    return {row[0] for row in db.execute("SELECT name FROM keys")}


def unique_name(db: sqlite3.Connection, name: str, now: float) -> str:
    """`name`, or the first of `name-2`, `name-3`, ... that no edge has or ever had, and none is invited under."""
    sql = "SELECT name FROM tokens WHERE name IS NOT NULL AND uses_left > 0 AND expires_at > ?"
    used = taken(db) | {row[0] for row in db.execute(sql, (now,))}
    candidate, number = name, 1
    while candidate in used:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def redeem(db: sqlite3.Connection, token: bytes, now: float) -> str | None:
    """Take one use from a token, inside a transaction; the name that it is for. Refused says what is wrong with it."""
    digest = token_hash(token)
    # Every one is compared, and in the same time however much of it is right.
    rows = db.execute("SELECT sha256, uses_left, expires_at, name FROM tokens").fetchall()
    found = [row for row in rows if hmac.compare_digest(str(row[0]), digest)]
    if not found:
        raise Refused(f"the hub does not know this join string's token: {ASK}")
    _, uses_left, expires_at, name = found[0]
    if uses_left < 1:
        raise Refused(f"this join string is used up: {ASK}")
    if now >= expires_at:
        raise Refused(f"this join string has expired: {ASK}")
    db.execute("UPDATE tokens SET uses_left = uses_left - 1 WHERE sha256 = ?", (digest,))
    return None if name is None else str(name)


def shown(token: bytes) -> str:
    """What a token is called where it must not be seen."""
    return f"token {token_hash(token)[:SHOWN]}" if token else "no token"
