"""Fetching from the hub: resumable, verified, cached; a hub that lies gets a named error and nothing on the disk."""

from __future__ import annotations

import hashlib
import os
import struct
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge import fetch
from edge.fetch import Resource, Wanted, fetch_adapter, fetch_bytes, fetch_file, fetch_files
from edge.pace import SLOW_BYTES_PER_S, Pace
from messaging.console import Task
from messaging.errors import ErrorCode, HubError, HubUnreachable, InputError, ProtocolError
from messaging.messages import AnyMessage, Bye, Chunk, Fetch, Tensor
from tests.support.here import Blob, HubHere, Mangle

SMALL = 1000
DATA = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CHUNK_BYTES", SMALL)


@pytest.fixture
def hub() -> HubHere:
    blobs = {"blob": Blob(DATA), "empty": Blob(b""), "even": Blob(DATA[: 3 * SMALL])}
    return HubHere(lambda name: blobs[name])


BLOB = Resource("blob", 1 << 20)


class Seen(Task):
    """Notes what is told of it."""

    def __init__(self) -> None:
        super().__init__("seen", None, "bytes", time.monotonic)
        self.steps: list[float] = []
        self.before = 0.0

    def advance(self, count: float = 1) -> None:
        self.steps.append(count)

    def found(self, count: float) -> None:
        self.before += count


def spoil(offset: int, times: int) -> Mangle:
    """Change a byte of the piece at this offset, the first `times` times."""
    left = [times]

    def mangle(asked: Fetch, chunk: Chunk) -> Chunk:
        if asked.offset != offset or left[0] == 0:
            return chunk
        left[0] -= 1
        data = bytearray(b"".join(chunk.data.chunks))
        data[0] ^= 1
        return replace(chunk, data=replace(chunk.data, chunks=(bytes(data),)))

    return mangle


# --- pieces -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "data"), [("blob", DATA), ("empty", b""), ("even", DATA[: 3 * SMALL])])
def test_bytes_and_files_come_whole(hub: HubHere, tmp_path: Path, name: str, data: bytes) -> None:
    assert fetch_bytes(hub, name) == data
    pieces = max(1, -(-len(data) // SMALL))
    assert len(hub.asked) == pieces
    path = tmp_path / "new" / "folder" / "file"
    seen = Seen()
    fetch_file(hub, Resource(name, 1 << 20), path, prefix=b"head", task=seen)
    assert (len(seen.steps), sum(seen.steps), seen.before) == (pieces, len(data), 0)
    assert path.read_bytes() == b"head" + data
    assert [item.name for item in path.parent.iterdir()] == ["file"]
    assert len(hub.asked) == 2 * pieces


def test_a_file_that_is_there_is_not_asked_for(hub: HubHere, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    fetch_file(hub, BLOB, tmp_path / "file")
    assert not hub.asked
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("prefix", [b"", b"head"])
def test_an_interrupted_fetch_goes_on_where_it_stopped(hub: HubHere, tmp_path: Path, prefix: bytes) -> None:
    hub.dies_after = 4
    with pytest.raises(HubUnreachable):
        fetch_file(hub, BLOB, tmp_path / "file", prefix)
    part = tmp_path / "file.part"
    kept = part.stat().st_size - len(prefix)
    assert not (tmp_path / "file").exists()
    assert kept >= 2 * SMALL
    hub.asked.clear()
    hub.dies_after = 10**9
    # What a killed process leaves need not end where a piece does.
    part.write_bytes(part.read_bytes()[:-7])
    seen = Seen()
    fetch_file(hub, BLOB, tmp_path / "file", prefix, seen)
    assert (tmp_path / "file").read_bytes() == prefix + DATA
    assert hub.asked[0].offset == kept - 7
    assert (seen.before, seen.steps[0], sum(seen.steps)) == (kept - 7, SMALL, len(DATA) - kept + 7)
    assert not part.exists()


@pytest.mark.parametrize(
    ("left", "requests"),
    [
        (b"head" + DATA, 1),
        (b"head" + DATA[:3000] + b"x" + DATA[3001:5000], 6 + 11),
        (b"head" + DATA + b"more", 1 + 11),
        (b"he", 11),
        (b"HEAD" + DATA[:3000], 11),
        (b"", 11),
    ],
)
def test_whatever_an_earlier_fetch_has_left_the_file_is_right(
    hub: HubHere, tmp_path: Path, left: bytes, requests: int
) -> None:
    (tmp_path / "file.part").write_bytes(left)
    fetch_file(hub, BLOB, tmp_path / "file", b"head")
    assert (tmp_path / "file").read_bytes() == b"head" + DATA
    assert len(hub.asked) == requests


def test_a_corrupted_piece_is_fetched_again(hub: HubHere, tmp_path: Path) -> None:
    hub.mangle = spoil(2 * SMALL, times=1)
    fetch_file(hub, BLOB, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == DATA
    hub.mangle = spoil(2 * SMALL, times=1)
    assert fetch_bytes(hub, "blob") == DATA


def test_what_stays_corrupted_is_an_error_and_leaves_nothing(hub: HubHere, tmp_path: Path) -> None:
    hub.mangle = spoil(2 * SMALL, times=2)
    with pytest.raises(ProtocolError, match="blob does not have the hash"):
        fetch_file(hub, BLOB, tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    assert len(hub.asked) == 22
    hub.mangle = spoil(2 * SMALL, times=2)
    with pytest.raises(ProtocolError, match="blob does not have the hash"):
        fetch_bytes(hub, "blob")


def test_a_resource_that_changes_meanwhile_is_fetched_anew(hub: HubHere, tmp_path: Path) -> None:
    old, new = Blob(DATA), Blob(DATA[::-1])
    changing = HubHere(lambda _: old if len(changing.asked) < 4 else new)
    fetch_file(changing, BLOB, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == new.data
    changing.asked.clear()
    assert fetch_bytes(changing, "blob") == new.data


HOSTILE: dict[str, Mangle] = {
    "another kind": lambda _, chunk: Bye(),
    "another offset": lambda _, chunk: replace(chunk, offset=chunk.offset + 1),
    "no hash": lambda _, chunk: replace(chunk, sha256="../../x"),
    "endless": lambda _, chunk: replace(chunk, total=1 << 50),
    "empty piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (0,), ())),
    "short piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (1,), (b"x",))),
    "long piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (SMALL + 1,), (b"x" * (SMALL + 1),))),
    "no bytes": lambda _, chunk: replace(chunk, data=Tensor("f32", (SMALL,), (b"x" * 4 * SMALL,))),
    "packed unasked": lambda _, chunk: replace(
        chunk, element=4, data=Tensor("u8", (SMALL - 1,), (b"x" * (SMALL - 1),))
    ),
    "two dimensions": lambda _, chunk: replace(chunk, data=replace(chunk.data, shape=(SMALL, 1))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_piece_that_was_not_asked_for_is_refused(hub: HubHere, tmp_path: Path, kind: str) -> None:
    hub.mangle = HOSTILE[kind]
    with pytest.raises(ProtocolError, match="blob"):
        fetch_file(hub, BLOB, tmp_path / "file")
    with pytest.raises(ProtocolError, match="blob"):
        fetch_bytes(hub, "blob", 1 << 20)
    assert not (tmp_path / "file").exists()
    assert len(hub.asked) == 2


def test_the_size_must_be_the_expected_one(hub: HubHere, tmp_path: Path) -> None:
    for resource in (Resource("blob", len(DATA) - 1), Resource("blob", 1 << 20, least=len(DATA) + 1)):
        with pytest.raises(ProtocolError, match=f"has {len(DATA)} bytes"):
            fetch_file(hub, resource, tmp_path / "file")
    with pytest.raises(ProtocolError, match="not what its manifest says"):
        fetch_file(hub, Resource("blob", 1 << 20, sha256="0" * 64), tmp_path / "file")


def test_a_refusal_is_passed_on(tmp_path: Path) -> None:
    def find(name: str) -> Any:
        raise HubError(ErrorCode.NO_RESOURCE, "nothing here")

    with pytest.raises(HubError, match="nothing here"):
        fetch_file(HubHere(find), BLOB, tmp_path / "file")


def test_a_disk_that_refuses_is_an_input_error(hub: HubHere, tmp_path: Path) -> None:
    (tmp_path / "file.part").mkdir()
    with pytest.raises(InputError, match=f"cannot write into {tmp_path}"):
        fetch_file(hub, BLOB, tmp_path / "file")


class FixedPace(Pace):
    def more(self, under_way: int, pieces: int) -> bool:
        return pieces < 5


def test_as_many_pieces_are_under_way_as_the_pace_says(hub: HubHere, tmp_path: Path) -> None:
    answered: list[int] = []
    most: list[int] = []

    class Counting:
        def submit(self, message: AnyMessage) -> Future[Any]:
            future = hub.submit(message)
            plain = future.result

            def result(timeout: float | None = None) -> Any:
                answered.append(1)
                return plain(timeout)

            most.append(len(hub.asked) - len(answered))
            future.result = result  # type: ignore[method-assign]
            return future

    fetch_file(Counting(), BLOB, tmp_path / "file", pace=FixedPace())
    assert max(most) == 5


def test_two_fetches_of_one_file_do_the_work_once(hub: HubHere, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(fetch_file, hub, BLOB, tmp_path / "file") for _ in range(4)]
        for future in done:
            future.result()
    assert len(hub.asked) == 11
    assert (tmp_path / "file").read_bytes() == DATA


# --- many files -------------------------------------------------------------------------------


def three_files(folder: Path) -> list[Wanted]:
    sizes = {"blob": len(DATA), "empty": 0, "even": 3 * SMALL}
    return [Wanted(Resource(name, size, size), folder / name, b"head") for name, size in sizes.items()]


def test_files_follow_each_other_without_a_pause(hub: HubHere, tmp_path: Path) -> None:
    # While the last pieces of one are under way, the first of the next are asked for.
    fetch_files(hub, tmp_path, three_files(tmp_path), pace=FixedPace())
    for name, data in (("blob", DATA), ("empty", b""), ("even", DATA[: 3 * SMALL])):
        assert (tmp_path / name).read_bytes() == b"head" + data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blob", "empty", "even"]
    assert len(hub.asked) == 11 + 1 + 3


def test_of_many_files_only_the_spoilt_one_is_fetched_again(hub: HubHere, tmp_path: Path) -> None:
    hub.mangle = spoil(10 * SMALL, times=1)
    fetch_files(hub, tmp_path, three_files(tmp_path))
    assert (tmp_path / "blob").read_bytes() == b"head" + DATA
    assert hub.names == ["blob"] * 11 + ["empty"] + ["even"] * 3 + ["blob"] * 11


def test_what_was_whole_when_the_hub_died_is_kept(hub: HubHere, tmp_path: Path) -> None:
    hub.dies_after = 14
    with pytest.raises(HubUnreachable):
        fetch_files(hub, tmp_path, three_files(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blob", "empty", "even.part"]
    hub.asked.clear()
    hub.dies_after = 10**9
    fetch_files(hub, tmp_path, three_files(tmp_path))
    assert hub.names == ["even"] * (3 - (hub.asked[0].offset // SMALL))


# --- packed pieces ----------------------------------------------------------------------------

WEIGHTS = b"".join(struct.pack("<f", 1.0 + number / 1e6) for number in range(2500))


def test_pieces_of_numbers_come_packed_over_a_slow_link(tmp_path: Path) -> None:
    hub, sizes = HubHere(lambda _: Blob(WEIGHTS)), []
    hub.mangle = lambda _, chunk: sizes.append(chunk.data.nbytes) or chunk  # type: ignore[func-returns-value]
    fetch_file(hub, Resource("w", 1 << 20, element=4), tmp_path / "file", b"head")
    assert (tmp_path / "file").read_bytes() == b"head" + WEIGHTS
    assert sum(sizes) < 0.8 * len(WEIGHTS)
    # What an interrupted fetch leaves need not end where a number does.
    os.truncate(tmp_path / "file", 4 + 1237)
    (tmp_path / "file").rename(tmp_path / "file.part")
    fetch_file(hub, Resource("w", 1 << 20, element=4), tmp_path / "file", b"head")
    assert (tmp_path / "file").read_bytes() == b"head" + WEIGHTS


def test_over_a_fast_link_nothing_is_packed(tmp_path: Path) -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.begin()
    now[0] += 1.0
    pace.arrived(int(2 * SLOW_BYTES_PER_S))
    hub = HubHere(lambda _: Blob(WEIGHTS))
    fetch_file(hub, Resource("w", 1 << 20, element=4), tmp_path / "file", pace=pace)
    assert hub.asked[0].element == 0


# --- adapters ---------------------------------------------------------------------------------


def get_adapter(hub: HubHere, folder: Path, name: str = "adapter/5/1:1") -> bytes:
    return fetch_adapter(hub, name, folder, Seen(), Pace())


def test_an_adapter_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    hub = HubHere(lambda _: Blob(DATA))
    hub.dies_after = 6
    with pytest.raises(HubUnreachable):
        get_adapter(hub, tmp_path)
    hub.asked.clear()
    hub.dies_after = 10**9
    assert get_adapter(hub, tmp_path) == DATA
    assert [asked.offset for asked in hub.asked[:2]] == [0, 5 * SMALL]
    assert hub.asked[0].length == 0
    hub.asked.clear()
    assert get_adapter(hub, tmp_path) == DATA
    assert len(hub.asked) == 1


def test_another_adapter_under_the_same_version_is_another(tmp_path: Path) -> None:
    # A hub that died after publishing may publish something else under that number.
    hub = HubHere(lambda _: Blob(DATA))
    hub.dies_after = 6
    with pytest.raises(HubUnreachable):
        get_adapter(hub, tmp_path)
    for turn in range(4):
        assert get_adapter(HubHere(lambda _, turn=turn: Blob(DATA[turn:])), tmp_path) == DATA[turn:]  # type: ignore[misc]
        os.utime(tmp_path / hashlib.sha256(DATA[turn:]).hexdigest(), (turn, turn))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_copy_of_an_adapter_is_fetched_again(tmp_path: Path) -> None:
    hub = HubHere(lambda _: Blob(DATA))
    get_adapter(hub, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(DATA[:-1])
    assert get_adapter(hub, tmp_path) == DATA
