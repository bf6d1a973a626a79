"""An edge's keys and its hub's, while one of them is being replaced."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from edge.membership import HubKey, enrolled, settle
from edge.state import EdgeState, Membership
from messaging.console import Journal
from messaging.errors import InputError, KeyFileError, Refused
from messaging.joining import HubAddress, JoinString
from messaging.keys import new_keys, save_keys

FIRST, SECOND, THIRD = (new_keys().public for _ in range(3))
ADDRESS = HubAddress("127.0.0.1", 5001, 5002, 5003, FIRST)


@pytest.fixture
def state(tmp_path: Path) -> EdgeState:
    return EdgeState(tmp_path / "edge")


# -- the hub's key ---------------------------------------------------------------------------------


def test_an_announced_key_is_kept_and_tried_when_the_present_one_does_not_fit() -> None:
    kept: list[tuple[str, str | None]] = []
    key = HubKey(ADDRESS, None, lambda *both: kept.append(both))
    assert key.other() is None
    key.announced(SECOND)
    key.announced(SECOND)
    key.announced("no key")
    key.announced(FIRST)
    assert kept == [(FIRST, SECOND)]
    key.proved()
    assert kept == [(FIRST, SECOND)]
    assert [key.other(), key.other(), key.other()] == [SECOND, FIRST, SECOND]
    key.proved()
    assert kept == [(FIRST, SECOND), (SECOND, None)]
    assert key.other() is None
    key.announced(THIRD)
    assert key.other() == THIRD


def test_what_was_announced_outlives_the_process(state: EdgeState) -> None:
    state.set_membership(Membership(ADDRESS, "clinic", next_key=SECOND))
    assert state.membership() == Membership(ADDRESS, "clinic", next_key=SECOND)
    fields = json.loads((state.folder / "hub.json").read_text())
    del fields["next_key"]
    (state.folder / "hub.json").write_text(json.dumps(fields))
    assert state.membership() == Membership(ADDRESS, "clinic")


def test_a_join_string_with_another_key_is_taken_if_that_hub_knows_this_edge(
    state: EdgeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Membership(ADDRESS, "clinic", "2:1", 0.1, next_key=THIRD)
    moved = HubAddress("127.0.0.1", 6001, 6002, 6003, SECOND)
    join = JoinString(moved, b"").encode()
    state.set_membership(known)
    monkeypatch.setattr("edge.membership.lets_in", lambda *_: False)
    with pytest.raises(Refused, match="belongs to another hub"):
        enrolled(state, Journal(), join, "x", 1.0)
    assert state.membership() == known
    monkeypatch.setattr("edge.membership.lets_in", lambda hub, keys, _: (hub, keys) == (moved, state.keys()))
    assert enrolled(state, Journal(), join, "x", 1.0) == Membership(moved, "clinic", "2:1", 0.1)
    assert state.membership() == Membership(moved, "clinic", "2:1", 0.1)


def test_the_announced_key_in_a_join_string_needs_no_question(
    state: EdgeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("edge.membership.lets_in")
    state.set_membership(Membership(ADDRESS, "clinic", next_key=SECOND))
    join = JoinString(HubAddress("127.0.0.1", 5001, 5002, 5003, SECOND), b"").encode()
    assert enrolled(state, Journal(), join, "x", 1.0).hub.key == SECOND


# -- the edge's key --------------------------------------------------------------------------------


def test_the_new_pair_is_made_once_and_takes_the_place_of_the_old_in_one_step(state: EdgeState) -> None:
    first = state.keys()
    assert state.next_keys() is None
    second = state.make_next_keys()
    assert state.make_next_keys() == state.next_keys() == second != first
    assert state.keys() == first
    state.adopt_next_keys()
    assert (state.keys(), state.next_keys()) == (second, None)
    assert {path.stat().st_mode & 0o777 for path in state.folder.glob("*.key")} == {0o600}


def test_a_new_pair_is_used_when_the_hub_lets_it_in_and_kept_until_then(
    state: EdgeState, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership = Membership(ADDRESS, "clinic")
    assert not settle(state, membership)
    first, second = state.keys(), state.make_next_keys()
    monkeypatch.setattr("edge.membership.lets_in", lambda *_: False)
    assert not settle(state, membership)
    assert (state.keys(), state.next_keys()) == (first, second)
    monkeypatch.setattr("edge.membership.lets_in", lambda hub, keys, _: keys == second)
    assert settle(state, membership)
    assert (state.keys(), state.next_keys()) == (second, None)


def test_both_keys_of_the_hub_are_tried_for_the_new_pair(state: EdgeState, monkeypatch: pytest.MonkeyPatch) -> None:
    second = state.make_next_keys()
    asked = []

    def lets_in(hub: HubAddress, keys: object, timeout_s: float) -> bool:
        asked.append(hub.key)
        if hub.key == FIRST:
            raise Refused("another key")
        return True

    monkeypatch.setattr("edge.membership.lets_in", lets_in)
    with pytest.raises(Refused):
        settle(state, Membership(ADDRESS, "clinic"))
    assert settle(state, Membership(ADDRESS, "clinic", next_key=SECOND))
    assert asked == [FIRST, FIRST, SECOND]
    assert state.keys() == second


# -- noise -----------------------------------------------------------------------------------------


def test_noise_outlives_the_key(state: EdgeState) -> None:
    state.keys()
    before = state.noise_secret()
    assert len(before) == 64
    state.make_next_keys()
    state.adopt_next_keys()
    assert state.noise_secret() == before != EdgeState(state.folder.parent / "other").noise_secret()


def test_a_state_from_before_keeps_the_noise_that_it_drew_from_its_key(state: EdgeState) -> None:
    old = new_keys()
    save_keys(state.folder / "edge.key", old)
    state.make_next_keys()
    state.adopt_next_keys()
    assert hashlib.sha256(state.noise_secret() + b"7").digest() == hashlib.sha256(f"{old.secret}7".encode()).digest()


def test_the_noise_secret_is_private(state: EdgeState) -> None:
    previous = os.umask(0)
    try:
        state.keys()
    finally:
        os.umask(previous)
    path = state.folder / "noise.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="others may read"):
        state.noise_secret()


def test_an_edge_that_is_enrolled_nowhere_has_no_key_to_replace(state: EdgeState) -> None:
    from edge.rotation import rotate_key

    with pytest.raises(InputError, match="enrolled nowhere"):
        rotate_key(state, Journal())
