"""Who is cut off, what becomes of its key, and what the screen says."""

from __future__ import annotations

import pytest

from hub.credits import Credits
from hub.guard import Guard
from hub.post import Stuck
from messaging.console import Journal
from messaging.errors import ErrorCode, HubError
from messaging.memory import MemoryHub
from messaging.transport import Allowance, Channel, Offence

MEGABYTE = 1 << 20


class Link(MemoryHub):
    watches = True

    def __init__(self) -> None:
        super().__init__()
        self.offences: list[Offence] = []
        self.allowance: Allowance | None = None

    def look(self, allowance: Allowance) -> list[Offence]:
        self.allowance = allowance
        found, self.offences = self.offences, []
        return found


class Access:
    """Key "k-NAME" is NAME's present key, "o-NAME" the one that it enrolled with."""

    def __init__(self) -> None:
        self.revoked: list[str] = []
        self.noted: list[tuple[str, str | None, str]] = []

    def note_cut_off(self, text: str, key: str | None, address: str) -> None:
        self.noted.append((text, key, address))

    def name_of(self, key: str) -> str | None:
        return key[2:] if key.startswith("k-") else None

    def origin_of(self, key: str) -> str:
        return "o" + key[1:]

    def revoke(self, name: str) -> None:
        self.revoked.append(name)


class Post:
    def __init__(self) -> None:
        self.stuck: list[Stuck] = []

    @property
    def waiting(self) -> bool:
        return bool(self.stuck)

    def cut_stuck(self) -> list[Stuck]:
        found, self.stuck = self.stuck, []
        return found


class Desk:
    credits = Credits(1 << 30)
    largest_request = 400 * MEGABYTE


class Gate:
    def __init__(self, link: Link) -> None:
        self.link, self.post, self.access, self.journal = link, Post(), Access(), Journal()
        self.guard = Guard(link, self.post, self.access, Desk(), self.journal)  # type: ignore[arg-type]

    def found(self, key: str | None, endless: bool) -> str:
        """One more offence of 500 MB; the line about it."""
        self.link.offences = [Offence(Channel.BULK, key, "10.0.0.9", 500 * MEGABYTE, endless)]
        self.guard.look()
        return self.journal.recent()[-1][9:]


@pytest.fixture
def gate() -> Gate:
    return Gate(Link())


def test_an_endless_sender_loses_its_key(gate: Gate) -> None:
    line = gate.found("k-ward", endless=True)
    assert line == "ward was cut off and its key revoked: it sent 500 MB without an end"
    assert gate.access.revoked == ["ward"]
    assert gate.access.noted == [(line, "k-ward", "10.0.0.9")]
    assert gate.link.allowance == Allowance(400 * MEGABYTE, 1 << 30)


@pytest.mark.parametrize("key", [None, "x-unknown"])
def test_nobody_is_blamed_without_a_name(gate: Gate, key: str | None) -> None:
    assert gate.found(key, endless=True) == "a connection from 10.0.0.9 was cut off: it sent 500 MB without an end"
    assert gate.access.revoked == []


def test_who_sends_more_than_there_is_room_for_hears_of_it_once_and_is_revoked_in_the_end(gate: Gate) -> None:
    gate.guard.check("o-ward")
    line = gate.found("k-ward", endless=False)
    assert line == "ward was cut off: there was no room for the 500 MB that it sent"
    gate.guard.check("o-other")
    with pytest.raises(HubError, match="smaller batch") as caught:
        gate.guard.check("o-ward")
    assert caught.value.code is ErrorCode.CREDITS
    gate.guard.check("o-ward")
    gate.found("k-ward", endless=False)
    assert gate.access.revoked == []
    assert "revoked" in gate.found("k-ward", endless=False)
    assert gate.access.revoked == ["ward"]


def test_a_stuck_reader_is_named_and_keeps_its_key(gate: Gate) -> None:
    gate.post.stuck = [Stuck("k-ward", 12 * MEGABYTE), Stuck(None, MEGABYTE)]
    gate.guard.look()
    lines = [line[9:] for line in gate.journal.recent()]
    assert lines == [
        "ward was cut off: it does not read its answers (12 MB unread)",
        "an edge was cut off: it does not read its answers (1 MB unread)",
    ]
    assert gate.access.revoked == []


def test_a_system_that_does_not_count_is_said_once() -> None:
    link = Link()
    link.watches = False
    gate = Gate(link)
    gate.guard.look()
    assert len(gate.journal.recent()) == 1
    assert "does not count" in gate.journal.recent()[0]
