"""Keys, names and tokens."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hub.store.database import SCHEMA_VERSION, Database, create_database
from hub.store.invitations import clean_name
from hub.store.state import HubState
from messaging.errors import InputError, Refused
from messaging.keys import new_keys

ROOT = Path(__file__).parents[2]


class Clock:
    """The time, as a test sets it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(tmp_path: Path, clock: Clock) -> Iterator[HubState]:
    with HubState.open(tmp_path / "state", exclusive=True, clock=clock) as opened:
        yield opened


def key() -> str:
    return new_keys().public


def test_a_token_enrols_its_number_of_keys(state: HubState) -> None:
    token = state.access.invite(uses=2)
    first, second = key(), key()
    assert state.access.name_of(first) is None
    assert state.access.enrol(token, first, "clinic") == "clinic"
    assert state.access.name_of(first) == "clinic"
    assert state.access.enrol(token, second, "clinic") == "clinic-2"
    with pytest.raises(Refused, match="used up"):
        state.access.enrol(token, key(), "third")
    assert [(edge.key, edge.name) for edge in state.access.edges()] == [(first, "clinic"), (second, "clinic-2")]


def test_unknown_and_expired_tokens_are_refused(state: HubState, clock: Clock) -> None:
    with pytest.raises(Refused, match="does not know"):
        state.access.enrol(b"", key(), "a")
    token = state.access.invite()
    clock.now += 600
    with pytest.raises(Refused, match="expired"):
        state.access.enrol(token, key(), "a")
    assert state.access.edges() == []
    clock.now -= 0.001
    assert state.access.enrol(token, key(), "a") == "a"


def test_a_refusal_for_a_token_long_gone(state: HubState, clock: Clock) -> None:
    token = state.access.invite()
    clock.now += 29 * 86400
    state.access.invite()
    with pytest.raises(Refused, match="expired"):
        state.access.enrol(token, key(), "a")
    clock.now += 2 * 86400
    state.access.invite()
    with pytest.raises(Refused, match="does not know"):
        state.access.enrol(token, key(), "a")


def test_an_enrolled_key_needs_no_token(state: HubState) -> None:
    mine = key()
    token = state.access.invite(uses=2)
    state.access.enrol(token, mine, "clinic")
    assert state.access.enrol(token, mine, "another name") == "clinic"
    assert state.access.enrol(b"nonsense", mine, "clinic") == "clinic"
    assert state.access.enrol(token, key(), "b") == "b"  # the repetition cost no use


def test_a_revoked_key_stays_out_for_ever_and_its_name_taken(state: HubState) -> None:
    mine = key()
    token = state.access.invite(uses=5)
    state.access.enrol(token, mine, "clinic")
    first = state.access.revoke("clinic")
    assert first.revoked_at is not None
    assert state.access.name_of(mine) is None
    with pytest.raises(Refused, match="revoked"):
        state.access.enrol(token, mine, "clinic")
    assert state.access.enrol(token, key(), "clinic") == "clinic-2"
    assert state.access.revoke("clinic") == first


def test_revoking_nobody_names_those_there_are(state: HubState) -> None:
    with pytest.raises(InputError, match="there are: none"):
        state.access.revoke("clinic")
    token = state.access.invite(uses=3)
    for name in ("b", "a", "gone"):
        state.access.enrol(token, key(), name)
    state.access.revoke("gone")
    with pytest.raises(InputError, match=r"no edge is called 'c'; there are: a, b$"):
        state.access.revoke("c")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("clinic.north_2", "clinic.north_2"),
        ("Hôpital Nord", "Hôpital-Nord"),
        ("\x1b[31mred\n\n", "31mred"),
        ("--help", "help"),
        ("../..", "edge"),
        ("", "edge"),
        ("x" * 500, "x" * 48),
    ],
)
def test_names_are_fit_for_a_terminal(given: str, kept: str) -> None:
    assert clean_name(given) == kept


def test_invitations_without_use_or_time_are_refused(state: HubState) -> None:
    for uses, ttl in ((0, 600.0), (-1, 600.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(InputError):
            state.access.invite(uses, ttl)


def test_the_token_itself_is_nowhere_on_the_disk(state: HubState) -> None:
    token = state.access.invite()
    content = b"".join(path.read_bytes() for path in state.folder.iterdir())
    assert token not in content
    assert token.hex().encode() not in content


def test_threads_that_race_for_one_use(state: HubState) -> None:
    for _ in range(10):
        token = state.access.invite()
        start = threading.Barrier(4)
        outcomes: list[str] = []

        def join(token: bytes = token, start: threading.Barrier = start, outcomes: list[str] = outcomes) -> None:
            start.wait()
            try:
                outcomes.append(state.access.enrol(token, key(), "racer"))
            except Refused:
                outcomes.append("refused")

        threads = [threading.Thread(target=join) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcome == "refused" for outcome in outcomes) == [False, True, True, True]
    names = [edge.name for edge in state.access.edges()]
    assert len(set(names)) == len(names) == 10


def test_refresh_says_when_the_list_changed(state: HubState) -> None:
    mine = key()
    with HubState.open(state.folder, exclusive=False) as other:
        assert not state.access.refresh()
        token = other.access.invite()
        assert not state.access.refresh()  # a commit, but not of a key
        other.access.enrol(token, mine, "clinic")
        assert state.access.refresh()
        assert state.access.name_of(mine) == "clinic"
        state.access.record_seen([mine])
        assert not state.access.refresh()
        assert other.access.edges()[0].last_seen == 1_000_000.0


def test_refresh_reports_what_a_look_up_noticed_first(state: HubState) -> None:
    mine = key()
    state.access.enrol(state.access.invite(), mine, "clinic")
    assert state.access.refresh()
    with HubState.open(state.folder, exclusive=False) as other:
        other.access.revoke("clinic")
    deadline = time.monotonic() + 5
    while state.access.name_of(mine) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert state.access.refresh()
    assert not state.access.refresh()


def test_a_look_up_waits_for_no_writer(state: HubState) -> None:
    mine = key()
    state.access.enrol(state.access.invite(), mine, "clinic")
    with state._database.transaction() as db:
        db.execute("UPDATE keys SET revoked_at = 1")
        began = time.monotonic()
        state.access.refresh()
        assert state.access.name_of(mine) == "clinic"
        assert time.monotonic() - began < 4, "it would wait for a writer for 5 s"
    state.access.refresh()
    assert state.access.name_of(mine) is None


def test_revoking_in_another_process_takes_effect_within_a_second(state: HubState) -> None:
    token = state.access.invite(uses=2)
    bad, good = key(), key()
    state.access.enrol(token, bad, "bad")
    state.access.enrol(token, good, "good")
    seen: list[float] = []

    def look() -> None:  # as the hub's I/O thread does, for every message
        deadline = time.monotonic() + 120
        seen.append(time.monotonic())
        while state.access.name_of(bad) is not None and time.monotonic() < deadline:
            time.sleep(0.005)
            seen.append(time.monotonic())
        seen.append(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    code = (
        "import sys, time, pathlib\nfrom hub import admin\n"
        "admin.revoke(pathlib.Path(sys.argv[1]), 'bad')\nprint(time.monotonic())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(state.folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    thread.join()
    # Where the machine kept this thread from looking, it could not know.
    late = [(before, after) for before, after in pairwise(seen) if after > float(done.stdout)]
    assert seen[-1] - float(done.stdout) < 1.0 + max(after - before for before, after in late)
    assert state.access.name_of(bad) is None
    assert state.access.name_of(good) == "good"


# -- invitations for a name ------------------------------------------------------------------------


def test_an_invitation_for_a_name_gives_one_edge_that_name(state: HubState) -> None:
    token = state.access.invite(name="clinic")
    (open_,) = state.access.invitations()
    assert (open_.name, open_.uses_left) == ("clinic", 1)
    assert state.access.enrol(token, key(), "whatever") == "clinic"
    assert state.access.invitations() == []
    with pytest.raises(Refused, match="used up"):
        state.access.enrol(token, key(), "clinic")


def test_nobody_else_gets_a_name_that_somebody_is_invited_under(state: HubState, clock: Clock) -> None:
    named, other = state.access.invite(name="clinic"), state.access.invite(uses=3)
    assert state.access.enrol(other, key(), "clinic") == "clinic-2"
    assert state.access.enrol(named, key(), "x") == "clinic"
    state.access.invite(name="bank", ttl_s=1)
    clock.now += 2
    assert state.access.enrol(other, key(), "bank") == "bank"


@pytest.mark.parametrize(("name", "uses"), [("a b", 1), ("", 1), ("x" * 49, 1), ("clinic", 2)])
def test_names_that_nobody_can_be_invited_under(state: HubState, name: str, uses: int) -> None:
    with pytest.raises(InputError):
        state.access.invite(uses, name=name)


def test_a_name_that_was_ever_taken_is_invited_no_more(state: HubState) -> None:
    first, second = state.access.invite(name="clinic"), state.access.invite(name="clinic")
    mine = key()
    state.access.enrol(first, mine, "")
    with pytest.raises(Refused, match="taken by now"):
        state.access.enrol(second, key(), "")
    state.access.revoke("clinic")
    with pytest.raises(InputError, match="has, or had"):
        state.access.invite(name="clinic")


def test_invitations_that_are_open(state: HubState, clock: Clock) -> None:
    token = state.access.invite(uses=2, ttl_s=60)
    state.access.invite(ttl_s=30)
    assert [open_.uses_left for open_ in state.access.invitations()] == [1, 2]
    state.access.enrol(token, key(), "a")
    clock.now += 30
    assert [open_.uses_left for open_ in state.access.invitations()] == [1]
    with pytest.raises(InputError):
        state.access.invite(ttl_s=366 * 86400)


# -- replaced keys ---------------------------------------------------------------------------------


def test_a_replaced_key_is_out_and_the_new_one_is_the_same_edge(state: HubState) -> None:
    first, second, third = key(), key(), key()
    state.access.enrol(state.access.invite(), first, "clinic")
    assert state.access.replace(first, second) == "clinic"
    assert (state.access.name_of(first), state.access.name_of(second)) == (None, "clinic")
    assert state.access.origin_of(second) == first
    state.access.replace(first, third)
    assert (state.access.name_of(second), state.access.name_of(third)) == (None, "clinic")
    assert (state.access.origin_of(third), state.access.present_key(first)) == (first, third)
    assert state.access.name_by_origin(first) == "clinic"
    state.access.record_seen([first])
    (edge,) = state.access.edges()
    assert (edge.key, edge.name, edge.last_seen) == (third, "clinic", 1_000_000.0)


def test_a_replaced_key_cannot_join_again(state: HubState) -> None:
    first, second = key(), key()
    token = state.access.invite(uses=5)
    state.access.enrol(token, first, "clinic")
    state.access.replace(first, second)
    with pytest.raises(Refused, match="replaced"):
        state.access.enrol(token, first, "clinic")
    assert (state.access.standing(first), state.access.standing(second)) == ("replaced", "enrolled")
    assert "replaced" in state.access.why_not(first)
    state.access.revoke("clinic")
    assert (state.access.standing(second), state.access.standing(key())) == ("revoked", "unknown")
    assert "revoked" in state.access.why_not(second)
    assert "does not know" in state.access.why_not(key())
    assert state.access.name_by_origin(first) is None


def test_keys_that_cannot_take_the_place_of_another(state: HubState) -> None:
    first, second, other = key(), key(), key()
    token = state.access.invite(uses=2)
    state.access.enrol(token, first, "clinic")
    state.access.enrol(token, other, "bank")
    state.access.replace(first, second)
    for wrong in (first, second, other, "", "x" * 39, "#" * 40):
        with pytest.raises(Refused, match="new key"):
            state.access.replace(first, wrong)
    assert state.access.name_of(second) == "clinic"
    state.access.revoke("clinic")
    with pytest.raises(Refused, match="enrolled"):
        state.access.replace(first, key())
    with pytest.raises(Refused, match="enrolled"):
        state.access.replace(key(), key())


def test_who_has_left_the_training_is_known_until_it_is_back(state: HubState) -> None:
    first, second = key(), key()
    token = state.access.invite(uses=2)
    for name, mine in (("clinic", first), ("bank", second)):
        state.access.enrol(token, mine, name)
    assert state.access.left() == set()
    state.access.note_left(first)
    state.access.note_left(second)
    state.access.note_back(second)
    assert state.access.left() == {first}
    # By its origin, whatever key it has by now.
    state.access.replace(first, key())
    assert state.access.left() == {first}
    with HubState.open(state.folder, exclusive=False) as beside:
        assert beside.access.left() == {first}
    state.access.note_back(first)
    assert state.access.left() == set()


# -- files of the version before -------------------------------------------------------------------

_VERSION_1 = """
CREATE TABLE keys (key TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, enrolled_at REAL NOT NULL, revoked_at REAL,
    last_seen REAL);
CREATE TABLE tokens (sha256 TEXT PRIMARY KEY, uses_left INTEGER NOT NULL, expires_at REAL NOT NULL);
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE manifest (kind TEXT NOT NULL, number INTEGER NOT NULL, sha256 TEXT NOT NULL, bytes INTEGER NOT NULL,
    written_at REAL NOT NULL, note TEXT NOT NULL, PRIMARY KEY (kind, number));
PRAGMA user_version = 1;
"""


def test_a_state_of_the_version_before_keeps_its_edges(tmp_path: Path) -> None:
    mine = key()
    old = sqlite3.connect(tmp_path / "hub.db")
    old.executescript(_VERSION_1)
    old.execute("INSERT INTO keys VALUES (?, 'clinic', 1.0, NULL, NULL)", (mine,))
    old.commit()
    old.close()
    with pytest.raises(InputError, match="older FedSEA"):
        HubState.open(tmp_path, exclusive=False)
    with HubState.open(tmp_path, exclusive=True) as state:
        assert state.access.name_of(mine) == "clinic"
        assert state.access.origin_of(mine) == mine
        second = key()
        state.access.replace(mine, second)
        assert state.access.enrol(state.access.invite(name="bank"), key(), "") == "bank"
        assert state.access.present_key(mine) == second
        state.access.note_left(mine)
        assert state.access.left() == {mine}
    create_database(tmp_path / "hub.db")
    database = Database(tmp_path / "hub.db")
    assert database.rows("PRAGMA user_version") == [(SCHEMA_VERSION,)]
    database.close()
