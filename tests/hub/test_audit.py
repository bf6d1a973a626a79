"""The log of who was let in and who was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from hub.store import audit
from hub.store.audit import AuditLog
from hub.store.state import HubState
from messaging.errors import Refused
from messaging.joining import token_hash
from messaging.keys import new_keys


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def log(tmp_path: Path, clock: Clock) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl", clock)


def lines(log: AuditLog) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.path.read_text().splitlines()]


def test_a_line_is_json_with_the_time_in_utc(log: AuditLog) -> None:
    log.write("enrolled", name="clinic", key="k", address="10.0.0.1", reason="with token 12")
    log.write("hub started")
    assert lines(log) == [
        {
            "time": "2023-11-14T22:13:20.000Z",
            "event": "enrolled",
            "name": "clinic",
            "key": "k",
            "address": "10.0.0.1",
            "reason": "with token 12",
        },
        {"time": "2023-11-14T22:13:20.000Z", "event": "hub started"},
    ]
    assert log.path.stat().st_mode & 0o777 == 0o600


def test_what_comes_off_the_wire_stays_on_its_line_and_is_cut(log: AuditLog) -> None:
    log.write("enrolment refused", name='x"}\n{"event": "forged"}', reason="y" * 10_000)
    (only,) = lines(log)
    assert only["event"] == "enrolment refused"
    assert len(str(only["reason"])) == 300


def test_a_flood_is_counted_and_not_written(log: AuditLog, clock: Clock) -> None:
    for number in range(10_000):
        log.write_often("refused at the handshake", key=f"stranger {number}")
        clock.now += 0.001
    assert len(lines(log)) == audit.BURST
    log.write_often("refused at the handshake", group="another", key="a member")
    assert len(lines(log)) == audit.BURST + 1
    clock.now += audit.WINDOW_S
    log.flush()
    last = lines(log)[-1]
    assert (last["event"], last["count"]) == ("refused at the handshake", 10_000 - audit.BURST)
    log.write_often("refused at the handshake", key="one more")
    assert lines(log)[-1]["key"] == "one more"


def test_what_was_counted_is_written_when_the_hub_stops(tmp_path: Path) -> None:
    with HubState.open(tmp_path, exclusive=True) as state:
        for _ in range(audit.BURST + 5):
            state.refused_at_the_handshake("key", "10.0.0.1", "not enrolled")
    assert lines(state.audit)[-1]["count"] == 5


def test_files_are_turned_over_and_the_oldest_goes(tmp_path: Path, clock: Clock) -> None:
    log = AuditLog(tmp_path / "audit.jsonl", clock, most_bytes=1000, kept=3)
    for number in range(200):
        log.write("event", reason=str(number))
    assert sorted(path.name for path in tmp_path.glob("audit.jsonl*")) == [
        "audit.jsonl",
        "audit.jsonl.1",
        "audit.jsonl.2",
        "audit.jsonl.3",
    ]
    assert all(path.stat().st_size < 1200 for path in tmp_path.iterdir())
    shown = log.last(30)
    assert [int(event["reason"]) for event in shown] == list(range(170, 200))
    assert len(log.last(1000)) < 100


def test_a_failing_disk_is_told_once_and_stops_nobody(
    log: AuditLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    log.tell = told.append
    with monkeypatch.context() as patch:

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "write", full)
        for _ in range(3):
            log.write("enrolled")
    assert len(told) == 1
    assert "ALARM" in told[0]
    assert "No space left" in told[0]
    log.write("revoked")
    assert "written again" in told[1]
    assert [event["event"] for event in log.last(5)] == ["revoked"]


def _write_many(path: Path, who: str) -> None:
    log = AuditLog(path, most_bytes=5_000, kept=100)
    for number in range(100):
        log.write("event", name=who, reason=str(number))


def test_processes_and_threads_lose_nothing_to_each_other(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_write_many, args=(path, f"process {number}")) for number in range(2)]
    for writer in writers:
        writer.start()
    log = AuditLog(path, most_bytes=5_000, kept=100)
    threads = [
        threading.Thread(target=lambda: [log.write("event", name="thread") for _ in range(100)]) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for each in (*threads, *writers):
        each.join()
    assert len(log.last(1000)) == 400


def test_what_the_list_does_is_in_the_log_and_no_token_or_secret(tmp_path: Path) -> None:
    keys, second, stranger = new_keys(), new_keys(), new_keys()
    with HubState.open(tmp_path, exclusive=True) as state:
        hub = state.keys()
        token = state.access.invite(uses=1)
        state.access.enrol(token, keys.public, "clinic", "10.0.0.7")
        for wrong in (token, b"guess"):
            with pytest.raises(Refused):
                state.access.enrol(wrong, stranger.public, "who", "10.0.0.8")
        state.access.replace(keys.public, second.public)
        state.rotate_keys()
        state.access.revoke("clinic")
        state.access.revoke("clinic")
        events = state.audit.last(100)
    assert [event["event"] for event in events] == [
        "invitation made",
        "enrolled",
        "enrolment refused",
        "enrolment refused",
        "key replaced",
        "new hub key announced",
        "revoked",
    ]
    assert events[1]["reason"] == f"with token {token_hash(token)[:8]}"
    assert (events[1]["name"], events[1]["key"], events[1]["address"]) == ("clinic", keys.public, "10.0.0.7")
    assert "used up" in events[2]["reason"]
    assert (events[4]["key"], events[4]["reason"]) == (second.public, f"it was {keys.public}")
    assert events[6]["key"] == second.public
    content = (tmp_path / "audit.jsonl").read_bytes()
    secret = (tmp_path / "hub-next.key").read_text().split()[-1]
    for hidden in (token, token.hex().encode(), token_hash(token).encode()):
        assert hidden not in content
    for pair in (hub.secret, keys.secret, second.secret, secret):
        assert pair.encode() not in content
        assert json.dumps(pair)[1:-1].encode() not in content
