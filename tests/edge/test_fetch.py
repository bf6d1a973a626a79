"""Fetching from the hub: resumable, verified, cached; a hub that lies gets a named error and nothing on the disk."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge import fetch
from edge.fetch import Resource, fetch_bytes, fetch_file
from messaging.errors import ErrorCode, HubError, HubUnreachable, InputError, ProtocolError
from messaging.messages import AnyMessage, Chunk, Fetch, Pong, Tensor
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
    seen: list[tuple[int, int, str]] = []
    assert fetch_bytes(hub, name, progress=lambda *at: seen.append(at)) == data
    assert seen[-1] == (len(data), len(data), name)
    pieces = max(1, -(-len(data) // SMALL))
    assert len(hub.asked) == len(seen) == pieces
    path = tmp_path / "new" / "folder" / "file"
    fetch_file(hub, Resource(name, 1 << 20), path, prefix=b"head")
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
    seen: list[int] = []
    fetch_file(hub, BLOB, tmp_path / "file", prefix, lambda done, *_: seen.append(done))
    assert (tmp_path / "file").read_bytes() == prefix + DATA
    assert hub.asked[0].offset == kept - 7
    assert seen[0] == kept - 7 + SMALL
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
    "another kind": lambda _, chunk: Pong(1, 1, 1, 1, 1, 1, 0),
    "another offset": lambda _, chunk: replace(chunk, offset=chunk.offset + 1),
    "no hash": lambda _, chunk: replace(chunk, sha256="../../x"),
    "endless": lambda _, chunk: replace(chunk, total=1 << 50),
    "empty piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (0,), ())),
    "short piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (1,), (b"x",))),
    "long piece": lambda _, chunk: replace(chunk, data=Tensor("u8", (SMALL + 1,), (b"x" * (SMALL + 1),))),
    "no bytes": lambda _, chunk: replace(chunk, data=Tensor("f32", (SMALL,), (b"x" * 4 * SMALL,))),
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
    with pytest.raises(InputError, match=r"cannot write .*file"):
        fetch_file(hub, BLOB, tmp_path / "file")


def test_two_pieces_are_under_way_and_no_more(hub: HubHere, tmp_path: Path) -> None:
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

    fetch_file(Counting(), BLOB, tmp_path / "file")
    assert max(most) == fetch.IN_FLIGHT


def test_two_fetches_of_one_file_do_the_work_once(hub: HubHere, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as threads:
        done = [threads.submit(fetch_file, hub, BLOB, tmp_path / "file") for _ in range(4)]
        for future in done:
            future.result()
    assert len(hub.asked) == 11
    assert (tmp_path / "file").read_bytes() == DATA
