"""The state folder: one hub at a time, others beside it."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from hub.store.database import SCHEMA_VERSION
from hub.store.files import StoreError
from hub.store.state import HubState, ModelInfo
from messaging.errors import InputError, KeyFileError
from messaging.joining import HubAddress
from messaging.keys import load_keys, new_keys, save_keys
from messaging.messages import Recipe

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(1e-3, 8, 16.0, ("self_attn.q_proj", "mlp.up_proj"), 20, 3, 2, float("inf"), 0, 0.0, 7)
MODEL = ModelInfo("hub/pocket", "ab" * 32, "f32", 6, False)

_SERVE = """
import pathlib, sys, time
from hub.store.state import HubState
state = HubState.open(pathlib.Path(sys.argv[1]), exclusive=True)
print(state.next_epoch(), flush=True)
time.sleep(60)
"""


def open_hub(folder: Path) -> HubState:
    return HubState.open(folder, exclusive=True)


def test_everything_in_the_folder_is_private(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        with open_hub(tmp_path / "state") as state:
            state.keys()
            state.next_epoch()
            state.write_status({})
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in state.folder.iterdir()}
    finally:
        os.umask(previous)
    assert set(modes) == {"hub.db", "hub.db-wal", "hub.db-shm", "hub.key", "lock", "status.json"}
    assert set(modes.values()) == {0o600}
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700


def test_what_was_set_is_there_after_a_restart(tmp_path: Path) -> None:
    address = HubAddress("10.0.0.1", 5001, 5002, 5003, new_keys().public)
    with open_hub(tmp_path) as state:
        assert (state.epoch(), state.address(), state.model(), state.recipe()) == (0, None, None, None)
        assert [state.next_epoch(), state.next_epoch()] == [1, 2]
        state.set_address(address)
        state.set_training(MODEL, RECIPE)
        keys = state.keys()
    with open_hub(tmp_path) as state:
        assert (state.epoch(), state.address(), state.model(), state.recipe()) == (2, address, MODEL, RECIPE)
        assert state.keys() == keys
        assert state.next_epoch() == 3


def test_a_second_hub_on_one_state_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = subprocess.Popen([sys.executable, "-c", _SERVE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    with first, first.stdout as stdout, ExitStack() as cleanup:
        cleanup.callback(first.kill)
        assert stdout.readline() == "1\n"
        with pytest.raises(InputError, match=rf"already running on .* \(process {first.pid}\)") as refused:
            open_hub(tmp_path)
        assert refused.value.exit_code == 2
        with HubState.open(tmp_path, exclusive=False) as beside:
            assert beside.running()
            assert beside.epoch() == 1
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert not beside.running()
    with open_hub(tmp_path) as state:
        assert state.next_epoch() == 2
        assert state.running()


def test_asking_whether_a_hub_runs_does_not_stop_one_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub.store.lock._PATIENCE_S", 20.0)
    open_hub(tmp_path).close()
    with (tmp_path / "lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        done_asking = threading.Timer(0.1, fcntl.flock, (asking, fcntl.LOCK_UN))
        done_asking.start()
        with open_hub(tmp_path) as state:
            assert state.next_epoch() == 1
        done_asking.join()


def test_a_folder_without_a_state_is_left_alone(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="is no state of a hub"):
            HubState.open(folder, exclusive=False)
    assert os.listdir(tmp_path) == []


def test_only_the_hub_itself_sweeps(tmp_path: Path) -> None:
    open_hub(tmp_path).close()
    stray = tmp_path / ".hub.key.0123456789abcdef.tmp"
    stray.write_bytes(b"half a key")
    HubState.open(tmp_path, exclusive=False).close()
    assert stray.exists()
    open_hub(tmp_path).close()
    assert not stray.exists()


def test_a_damaged_database_is_a_named_error_and_gives_the_lock_back(tmp_path: Path) -> None:
    (tmp_path / "hub.db").write_bytes(b"not a database, but long enough to be taken for one" * 50)
    for _ in range(2):
        with pytest.raises(StoreError, match="not a database of FedSEA"):
            open_hub(tmp_path)
    with pytest.raises(StoreError, match="failed"):
        HubState.open(tmp_path, exclusive=False)


@pytest.mark.parametrize(("version", "text"), [(SCHEMA_VERSION + 1, "newer FedSEA"), (0, "has no tables yet")])
def test_other_versions_of_the_tables(tmp_path: Path, version: int, text: str) -> None:
    with open_hub(tmp_path) as state:
        state._database.rows(f"PRAGMA user_version = {version}")
    with pytest.raises(StoreError, match=text):
        HubState.open(tmp_path, exclusive=False)


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    with open_hub(tmp_path) as state:
        state.keys()
        (tmp_path / "hub.key").chmod(0o644)
        with pytest.raises(KeyFileError, match="chmod 600"):
            state.keys()


def test_status_is_read_back_and_nonsense_is_none(tmp_path: Path) -> None:
    with HubState.open(tmp_path, exclusive=True, clock=lambda: 12.5) as state:
        assert state.read_status() is None
        state.write_status({"round": 3})
        assert state.read_status() == {"round": 3, "written_at": 12.5, "process": os.getpid()}
        for nonsense in (b"", b"{", b"[]", b"\xff"):
            (tmp_path / "status.json").write_bytes(nonsense)
            assert state.read_status() is None


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path) -> None:
    def fail(state: HubState) -> None:
        with state._database.transaction() as db:
            db.execute("INSERT INTO meta VALUES ('a', '1')")
            db.execute("INSERT INTO meta VALUES ('a', '2')")

    with open_hub(tmp_path) as state:
        with pytest.raises(StoreError, match="UNIQUE"):
            fail(state)
        assert state._database.rows("SELECT * FROM meta") == []
        assert state.next_epoch() == 1


# -- the hub's next key ----------------------------------------------------------------------------


def test_the_announced_key_is_used_from_the_next_start_on(tmp_path: Path) -> None:
    with open_hub(tmp_path) as state:
        first = state.keys()
        assert state.next_key() is None
        assert not state.adopt_next_keys()
        with HubState.open(tmp_path, exclusive=False) as beside:
            announced, since = beside.rotate_keys()
            assert beside.rotate_keys() == (announced, since)
        assert state.next_key() == announced != first.public
        assert state.keys() == first
        assert stat.S_IMODE((tmp_path / "hub-next.key").stat().st_mode) == 0o600
    with open_hub(tmp_path) as state:
        assert state.adopt_next_keys()
        assert state.keys().public == announced
        assert state.next_key() is None
        assert not (tmp_path / "hub-next.key").exists()
        assert not state.adopt_next_keys()


def test_a_key_that_was_made_but_not_announced_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_hub(tmp_path) as state:
        first = state.keys()
        with monkeypatch.context() as patch:
            patch.setattr(state, "_set", _die)
            with pytest.raises(ZeroDivisionError):
                state.rotate_keys()
        made = load_keys(tmp_path / "hub-next.key").public
    with open_hub(tmp_path) as state:
        assert not state.adopt_next_keys()
        assert state.keys() == first
        assert state.rotate_keys()[0] == made


def test_a_hub_killed_while_it_takes_its_new_key_has_it_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_hub(tmp_path) as state:
        state.keys()
        announced, _ = state.rotate_keys()
        with monkeypatch.context() as patch:
            patch.setattr("hub.store.state.take_over_keys", _die)
            with pytest.raises(ZeroDivisionError):
                state.adopt_next_keys()
            patch.undo()
            patch.setattr(state.audit, "write", _die)  # the file is in its place, the announcement still there
            with pytest.raises(ZeroDivisionError):
                state.adopt_next_keys()
    with open_hub(tmp_path) as state:
        assert state.adopt_next_keys()
        assert state.keys().public == announced
        assert state.next_key() is None


def test_an_announced_key_that_is_lost_is_not_replaced_by_another(tmp_path: Path) -> None:
    with open_hub(tmp_path) as state:
        state.keys()
        state.rotate_keys()
        save_keys(tmp_path / "hub-next.key", new_keys())
        with pytest.raises(KeyFileError, match="restore it"):
            state.adopt_next_keys()


def _die(*_: object, **__: object) -> None:
    raise ZeroDivisionError
