"""The hub's model at an edge that has none: fetched once, cached, mended, and safe from a hub that lies."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from edge.remote_model import RemoteModel, RemoteSource
from hub.library import Library
from messaging.console import Journal, Task, tasks
from messaging.errors import HubUnreachable, ProtocolError
from tests.support.folders import sharded_model, single_model, stored, watch_reads
from tests.support.here import Blob, HubHere

EMBEDDING = "model.embed_tokens.weight"
SMALL = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "CHUNK_BYTES", SMALL)


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


def test_blocks_come_in_one_transfer_and_are_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library, hub = serve(sharded_model(tmp_path / "model"))
    journal = Journal()
    source = RemoteModel(hub, tmp_path / "cache", library.hash, journal).open().source
    assert isinstance(source, RemoteSource)
    names = [EMBEDDING, "model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    source.read("model.norm.weight", torch.float32)
    hub.asked.clear()
    told: list[tuple[str, float | None, float]] = []

    class Told(Task):
        def advance(self, count: float = 1) -> None:
            told.append((self.title, self.total, count))

    monkeypatch.setattr(tasks, "Task", Told)
    source.fetch(names)
    size = sum(source.info(name).nbytes for name in names if name != "model.norm.weight")
    assert set(hub.names) == {f"tensor/{EMBEDDING}", "tensor/model.layers.0.mlp.up_proj.weight"}
    assert {entry[:2] for entry in told} == {("fetching blocks", size)}
    assert sum(count for _, _, count in told) == size
    hub.asked.clear()
    for name in names:
        assert torch.equal(source.read(name, torch.float32), stored(tmp_path / "model")[name])
    assert hub.asked == []


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
