"""What the hub serves, and that nothing else can be had from it."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from blocks.manifest import parse_manifest
from blocks.source import ModelFiles, open_model
from hub.library import Library, Resource
from hub.parts import Part
from messaging.errors import ErrorCode, HubError
from tests.support.folders import sharded_model, stored

#: An adapter of four layers.
LORA = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{which}.weight": torch.full(
        (4, 16 + layer), layer + 0.5
    )
    for layer in range(4)
    for which in "AB"
}
INITIAL = save({"lora": torch.arange(6.0)})


@dataclass(frozen=True)
class Adapter:
    path: Path
    sha256: str
    bytes: int


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    return open_model(str(sharded_model(tmp_path / "model", torch.bfloat16)))


@pytest.fixture
def library(files: ModelFiles, tmp_path: Path) -> Library:
    data = save(LORA)
    path = tmp_path / "v3.safetensors"
    path.write_bytes(data)
    adapters = {3: Adapter(path, hashlib.sha256(data).hexdigest(), len(data))}
    return Library(files, adapters.get, INITIAL)


def whole(resource: Resource, step: int = 1000) -> bytes:
    data = b"".join(resource.read(at, step) for at in range(0, resource.total, step))
    assert len(data) == resource.total
    assert hashlib.sha256(data).hexdigest() == resource.sha256
    return data


def test_the_manifest_lists_what_can_be_had(library: Library, files: ModelFiles) -> None:
    manifest = whole(library.open("manifest"))
    assert hashlib.sha256(manifest).hexdigest() == library.hash
    parsed = parse_manifest(manifest)
    for name, file in parsed.files.items():
        resource = library.open(f"file/{name}")
        assert whole(resource) == files.files[name].read_bytes()
        assert (resource.total, resource.sha256) == (file.size, file.sha256)
    tensors = stored(files.folder)
    assert set(parsed.tensors) == set(tensors)
    for name, value in tensors.items():
        assert whole(library.open(f"tensor/{name}")) == value.view(torch.uint8).numpy().tobytes()


def test_adapters_are_found_by_their_version(library: Library) -> None:
    assert torch.equal(load(whole(library.open("adapter/0")))["lora"], torch.arange(6.0))
    assert load(whole(library.open("adapter/3"))).keys() == LORA.keys()


def lora(layer: int, which: str = "A") -> str:
    return f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{which}.weight"


@pytest.mark.parametrize(
    ("partition", "layers"),
    [("1:1", (0, 3)), ("1:0", (0,)), ("2:1", (0, 1, 3)), ("1:2", (0, 2, 3)), ("3:0", (0, 1, 2))],
)
def test_an_edge_gets_the_tensors_of_its_layers_alone(
    library: Library, partition: str, layers: tuple[int, ...]
) -> None:
    whole_size = library.open("adapter/3").total
    part = library.open(f"adapter/3/{partition}")
    for step in (1, 7, 1000, 1 << 20):
        tensors = load(whole(part, step))
        assert tensors.keys() == {lora(layer, which) for layer in layers for which in "AB"}
    for name, value in tensors.items():
        assert torch.equal(value, LORA[name])
    assert part.total < whole_size
    assert library.open(f"adapter/3/{partition}") is part
    # The same bytes, whoever makes them: an upload to a restarted hub, or a fetch from it, goes on.
    assert Part(library.open("adapter/3"), lambda name: name in tensors).sha256 == part.sha256


def test_the_initial_adapter_has_parts_too(files: ModelFiles) -> None:
    library = Library(files, lambda _: None, save(LORA))
    assert load(whole(library.open("adapter/0/1:0"))).keys() == {lora(0), lora(0, "B")}


def test_a_part_is_made_anew_when_its_version_is_published_anew(files: ModelFiles, tmp_path: Path) -> None:
    path, kept = tmp_path / "v.safetensors", {}

    def publish(tensors: dict[str, torch.Tensor]) -> None:
        data = save(tensors)
        path.write_bytes(data)
        kept[3] = Adapter(path, hashlib.sha256(data).hexdigest(), len(data))

    library = Library(files, kept.get, INITIAL)
    publish(LORA)
    assert torch.equal(load(whole(library.open("adapter/3/1:0")))[lora(0)], LORA[lora(0)])
    publish({name: -value for name, value in LORA.items()})
    assert torch.equal(load(whole(library.open("adapter/3/1:0")))[lora(0)], -LORA[lora(0)])
    for version in range(1, 40):
        kept[version] = kept[3]
        library.open(f"adapter/{version}/1:0")
    assert len(library._parts) <= 16


@pytest.mark.parametrize(
    "name",
    [
        "",
        "file",
        "file/",
        "file/model-00001-of-00006.safetensors",
        "file/../model/config.json",
        "file/./config.json",
        "/etc/passwd",
        "file//etc/passwd",
        "tensor/nothing",
        "Manifest",
        "manifest/",
        "adapter/1",
        "adapter/03",
        "adapter/-3",
        "adapter/+3",
        "adapter/3 ",
        "adapter/٣",
        "adapter/" + "9" * 400,
        "adapter/",
        "adapter/3/",
        "adapter/3/1",
        "adapter/3/0:1",
        "adapter/3/01:1",
        "adapter/3/1:-1",
        "adapter/3/2:2",
        "adapter/3/4:0",
        "adapter/3/9999:9999",
        "adapter/1/1:1",
        "adapter/3/1:1/1:1",
    ],
)
def test_nothing_else_is_served(library: Library, name: str) -> None:
    with pytest.raises(HubError, match="serves nothing named") as raised:
        library.open(name)
    assert raised.value.code == ErrorCode.NO_RESOURCE


@pytest.mark.parametrize(
    "name", ["manifest", "file/config.json", "tensor/model.norm.weight", "adapter/3", "adapter/0", "adapter/3/1:1"]
)
def test_reading_ends_where_the_resource_ends(library: Library, name: str) -> None:
    resource = library.open(name)
    assert len(resource.read(resource.total - 3, 100)) == 3
    assert resource.read(resource.total, 100) == b""
    assert resource.read(resource.total + 1, 100) == b""
    assert resource.read(1 << 52, 100) == b""
    assert resource.read(0, 0) == b""


def test_a_tensor_is_hashed_once_however_many_ask(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    resource = library.open("tensor/model.embed_tokens.weight")
    reads: list[int] = []
    plain = type(resource).read
    started = threading.Barrier(4)

    def counted(self: Resource, offset: int, length: int) -> bytes:
        reads.append(offset)
        return plain(self, offset, length)

    def ask() -> None:
        started.wait()
        hashes.append(library.open("tensor/model.embed_tokens.weight").sha256)

    monkeypatch.setattr(type(resource), "read", counted)
    hashes: list[str] = []
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(hashes)) == 1
    assert len(hashes) == 4
    assert reads == [0]


@pytest.mark.parametrize("name", ["file/tokenizer.json", "tensor/model.norm.weight", "adapter/3"])
def test_a_file_that_went_away_is_a_named_error_without_paths(library: Library, tmp_path: Path, name: str) -> None:
    resource = library.open(name)
    for path in [*(tmp_path / "model").iterdir(), tmp_path / "v3.safetensors"]:
        path.unlink()
    with pytest.raises(HubError, match="cannot read") as raised:
        resource.read(0, 10)
    assert raised.value.code == ErrorCode.NO_RESOURCE
    assert str(tmp_path) not in str(raised.value)


def test_a_shard_that_was_cut_short_is_a_named_error(library: Library, files: ModelFiles) -> None:
    for path in files.folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(HubError, match="cannot read"):
        _ = library.open("tensor/model.embed_tokens.weight").sha256
