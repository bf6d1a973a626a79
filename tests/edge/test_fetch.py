"""Fetching from the hub: resumable, verified, cached; a hub that lies gets a named error and nothing on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from blocks.manifest import MAX_FILE_BYTES
from blocks.partition import Partition
from blocks.remote import build_edge
from blocks.source import open_model
from blocks.surgery import load
from edge import fetch
from edge.fetch import Resource, fetch_bytes, fetch_file
from edge.remote_model import RemoteModel
from hub.library import Library
from messaging.errors import ErrorCode, FedseaError, HubError, HubUnreachable, InputError, ProtocolError
from messaging.framing import decode, encode
from messaging.messages import TO_EDGE, AnyMessage, Chunk, Fetch, Packet, Pong, Tensor
from tests.support.folders import sharded_model, single_model, stored, watch_reads

EMBEDDING = "model.embed_tokens.weight"
SMALL = 1000
DATA = bytes(range(256)) * 40

Mangle = Callable[[Fetch, Chunk], AnyMessage]


class HubHere:
    """Asks a library in this process, through the wire's own encoding."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find
        self.asked: list[Fetch] = []
        self.mangle: Mangle = lambda _, chunk: chunk
        self.dies_after = 10**9

    def submit(self, message: AnyMessage) -> Future[Any]:
        assert isinstance(message, Fetch)
        self.asked.append(message)
        answer: Future[Any] = Future()
        try:
            answer.set_result(self._answer(message))
        except FedseaError as error:
            answer.set_exception(error)
        return answer

    def _answer(self, asked: Fetch) -> AnyMessage:
        if len(self.asked) > self.dies_after:
            raise HubUnreachable("the hub was switched off")
        resource = self._find(asked.resource)
        data = resource.read(asked.offset, asked.length)
        chunk = Chunk(asked.offset, resource.total, resource.sha256, Tensor("u8", (len(data),), (data,)))
        answer = self.mangle(asked, chunk)
        return decode([bytes(frame) for frame in encode(Packet(answer))], TO_EDGE).message

    @property
    def names(self) -> list[str]:
        return [message.resource for message in self.asked]


class Blob:
    def __init__(self, data: bytes) -> None:
        self.data, self.total, self.sha256 = data, len(data), hashlib.sha256(data).hexdigest()

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


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


# --- the model --------------------------------------------------------------------------------


def serve(folder: Path) -> tuple[Library, HubHere]:
    library = Library(open_model(str(folder)), lambda _: None, save({"lora": torch.zeros(2)}))
    return library, HubHere(library.open)


@pytest.mark.parametrize("make", [single_model, sharded_model])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edge_with_nothing_gets_its_blocks_from_the_hub(
    tmp_path: Path, make: Callable[..., Path], dtype: torch.dtype
) -> None:
    folder = make(tmp_path / "model", dtype)
    library, hub = serve(folder)
    model = RemoteModel(hub, tmp_path / "cache", library.hash).open()
    assert model.config.to_dict() == open_model(str(folder)).config.to_dict()
    assert model.tokenizer()("Zoë").input_ids == open_model(str(folder)).tokenizer()("Zoë").input_ids
    assert model.generation_config().eos_token_id == 2
    assert not [name for name in hub.names if name.startswith("tensor/")]

    cut = build_edge(model.config, Partition(1, 1), torch.float32)
    load(cut, model.source, torch.float32, torch.device("cpu"))
    expected = stored(folder)
    hosted = {cut.to_absolute(name): value for name, value in cut.model.state_dict().items()}
    for name, value in hosted.items():
        assert torch.equal(value, expected[name].float()), name
    fetched = {name.removeprefix("tensor/") for name in hub.names if name.startswith("tensor/")}
    assert fetched == set(hosted)
    assert not any(".1." in name or ".2." in name for name in fetched)


def test_a_second_start_fetches_nothing(tmp_path: Path) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    RemoteModel(hub, tmp_path / "cache", library.hash).open().source.read(EMBEDDING, torch.float32)
    hub.asked.clear()
    source = RemoteModel(hub, tmp_path / "cache", library.hash).open().source
    assert torch.equal(source.read(EMBEDDING, torch.float32), stored(tmp_path / "model")[EMBEDDING])
    assert hub.asked == []
    source.read("model.norm.weight", torch.float32)
    assert hub.names == ["tensor/model.norm.weight"]


def test_a_cached_tensor_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    RemoteModel(hub, tmp_path / "cache", library.hash).open().source.read(EMBEDDING, torch.float32)
    (path,) = (tmp_path / "cache" / library.hash / "tensors").iterdir()
    assert torch.equal(load_file(path)[EMBEDDING], stored(tmp_path / "model")[EMBEDDING])


def test_a_tensor_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    source = RemoteModel(hub, tmp_path / "cache", library.hash).open().source
    hub.dies_after = len(hub.asked) + 10
    with pytest.raises(HubUnreachable):
        source.read(EMBEDDING, torch.float32)
    hub.dies_after = 10**9
    hub.asked.clear()
    assert torch.equal(source.read(EMBEDDING, torch.float32), stored(tmp_path / "model")[EMBEDDING])
    assert hub.asked[0].offset >= 8 * SMALL


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "another byte": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[:500],
    "emptied": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("what", ["manifest.json", "files/config.json", "tensors/*"])
def test_a_damaged_cache_is_mended(tmp_path: Path, damage: str, what: str) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    cache = tmp_path / "cache"
    RemoteModel(hub, cache, library.hash).open().source.read(EMBEDDING, torch.float32)
    (path,) = (cache / library.hash).glob(what)
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    model = RemoteModel(hub, cache, library.hash).open()
    assert torch.equal(model.source.read(EMBEDDING, torch.float32), stored(tmp_path / "model")[EMBEDDING])
    assert path.read_bytes() == before


def test_many_threads_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    source = RemoteModel(hub, tmp_path / "cache", library.hash).open().source
    expected = stored(tmp_path / "model")
    most = watch_reads(monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        read = dict(zip(expected, threads.map(lambda name: source.read(name, torch.float32), expected), strict=True))
    assert all(torch.equal(read[name], value) for name, value in expected.items())
    assert most() == 1


# --- a hub that lies --------------------------------------------------------------------------


def lying(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> tuple[str, HubHere]:
    """A hub whose manifest was changed, hash and all."""
    library, _ = serve(sharded_model(tmp_path / "model"))
    manifest = json.loads(library.manifest)
    change(manifest)
    blob = Blob(json.dumps(manifest).encode())
    return blob.sha256, HubHere(lambda name: blob if name == "manifest" else library.open(name))


@pytest.mark.parametrize("digest", ["", "../../../../tmp/x", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n"])
def test_a_model_hash_that_is_none_is_refused(tmp_path: Path, digest: str) -> None:
    _, hub = serve(sharded_model(tmp_path / "model"))
    with pytest.raises(ProtocolError, match="hash"):
        RemoteModel(hub, tmp_path / "cache", digest)
    assert not (tmp_path / "cache").exists()


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    _, hub = serve(sharded_model(tmp_path / "model"))
    with pytest.raises(ProtocolError, match="not what its manifest says"):
        RemoteModel(hub, tmp_path / "cache", "0" * 64)


def test_names_off_the_wire_never_become_paths(tmp_path: Path) -> None:
    evil = "../../../evil"

    def change(manifest: dict[str, Any]) -> None:
        manifest["tensors"][evil] = manifest["tensors"][EMBEDDING]
        manifest["files"][evil] = manifest["files"]["config.json"]

    digest, hub = lying(tmp_path, change)
    plain = hub._find
    hub._find = lambda name: plain(f"tensor/{EMBEDDING}" if name.endswith(evil) else name)
    model = RemoteModel(hub, tmp_path / "a" / "b" / "cache", digest).open()
    model.source.read(evil, torch.float32)
    assert f"tensor/{evil}" in hub.names
    assert f"file/{evil}" not in hub.names
    outside = {path.name for path in tmp_path.rglob("*") if (tmp_path / "a" / "b" / "cache") not in path.parents}
    assert not any("evil" in name for name in outside)
    inside = [path for path in (tmp_path / "a" / "b" / "cache").rglob("*") if path.is_file()]
    assert not any("evil" in str(path) for path in inside)


def change_shape(manifest: dict[str, Any]) -> None:
    manifest["tensors"][EMBEDDING][1] = [1, 1]


def change_sample(manifest: dict[str, Any]) -> None:
    manifest["tensors"][EMBEDDING][2] = "0" * 64


@pytest.mark.parametrize(("change", "message"), [(change_shape, "bytes, expected"), (change_sample, "not the one in")])
def test_a_tensor_that_is_not_the_manifests_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    digest, hub = lying(tmp_path, change)
    source = RemoteModel(hub, tmp_path / "cache", digest).open().source
    with pytest.raises(ProtocolError, match=message):
        source.read(EMBEDDING, torch.float32)
    assert all(path.suffix == ".part" for path in (tmp_path / "cache" / digest / "tensors").iterdir())


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["tokenizer.json"][1] = "0" * 64

    digest, hub = lying(tmp_path, change)
    with pytest.raises(ProtocolError, match="not what its manifest says"):
        RemoteModel(hub, tmp_path / "cache", digest).open()


def test_sizes_are_limited(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["tokenizer.json"][0] = MAX_FILE_BYTES + 1

    digest, hub = lying(tmp_path, change)
    with pytest.raises(ProtocolError, match="manifest cannot be used"):
        RemoteModel(hub, tmp_path / "cache", digest)
