"""The manifest: the same for the same model, another for another, and safe to take off the wire."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from blocks.manifest import check_against, make_manifest, model_hash, parse_manifest
from blocks.source import open_model
from messaging.errors import InputError, ProtocolError
from tests.support.folders import edit_json, sharded_model, single_model, stored

EMBEDDING = "model.embed_tokens.weight"


def test_the_manifest_is_the_same_however_the_weights_are_stored(tmp_path: Path) -> None:
    one, many = open_model(str(single_model(tmp_path / "a"))), open_model(str(sharded_model(tmp_path / "b")))
    manifest = make_manifest(one)
    assert manifest == make_manifest(many)
    assert b" " not in manifest.split(b'"files"')[1]
    parsed = parse_manifest(manifest)
    assert set(parsed.tensors) == set(stored(tmp_path / "a"))
    assert parsed.files["config.json"].size == (tmp_path / "a" / "config.json").stat().st_size


@pytest.mark.parametrize("at", [0, -1])
def test_the_hash_notices_another_first_or_last_value(tmp_path: Path, at: int) -> None:
    folder = single_model(tmp_path / "m")
    before = open_model(str(folder))
    manifest = make_manifest(before)
    tensors = stored(folder)
    tensors[EMBEDDING].view(-1)[at] += 1
    save_file(tensors, folder / "model.safetensors")
    after = open_model(str(folder))
    assert model_hash(make_manifest(after)) != model_hash(manifest)
    parsed = parse_manifest(manifest)
    check_against(parsed, after, [name for name in after.source.names() if name != EMBEDDING])
    with pytest.raises(InputError, match=f"not the hub's model: the tensor {EMBEDDING} differs"):
        check_against(parsed, after, after.source.names())


def test_a_copy_is_held_against_the_hubs_config(tmp_path: Path) -> None:
    manifest = parse_manifest(make_manifest(open_model(str(single_model(tmp_path / "hub")))))
    folder = single_model(tmp_path / "m")
    edit_json(folder / "config.json", transformers_version="5.0.0", dtype="float16")
    check_against(manifest, open_model(str(folder)), [])
    edit_json(folder / "config.json", rms_norm_eps=0.5)
    with pytest.raises(InputError, match=r"rms_norm_eps is 0\.5 in its config"):
        check_against(manifest, open_model(str(folder)), [])


def good_manifest() -> dict[str, Any]:
    digest = "0" * 64
    return {
        "format": 1,
        "config": {"model_type": "llama"},
        "tensors": {"w": ["F32", [2, 3], digest]},
        "files": {"config.json": [10, digest]},
    }


def test_a_good_manifest_is_parsed() -> None:
    parsed = parse_manifest(json.dumps(good_manifest()).encode())
    assert parsed.tensors["w"].info.shape == (2, 3)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("format",), 2),
        (("config",), []),
        (("tensors",), []),
        (("tensors", "w"), ["F32", [1 << 40, 1 << 40], "0" * 64]),
        (("tensors", "w"), ["F32", [1 << 33, 4], "0" * 64]),
        (("tensors", "w"), ["F32", [-1], "0" * 64]),
        (("tensors", "w"), ["F32", [True], "0" * 64]),
        (("tensors", "w"), ["F32", [1] * 9, "0" * 64]),
        (("tensors", "w"), ["F32", 3, "0" * 64]),
        (("tensors", "w"), ["__import__", [1], "0" * 64]),
        (("tensors", "w"), ["F32", [1], "../../etc/passwd"]),
        (("tensors", "w"), ["F32", [1], 7]),
        (("tensors", "w"), ["F32", [1]]),
        (("tensors", "w"), None),
        (("tensors", "w" * 501), ["F32", [1], "0" * 64]),
        (("files",), {}),
        (("files", "config.json"), [-1, "0" * 64]),
        (("files", "config.json"), [65 << 20, "0" * 64]),
        (("files", "config.json"), [10, "0" * 63]),
        (("files", "config.json"), "ab"),
    ],
)
def test_a_hostile_manifest_is_refused(where: tuple[str, ...], value: Any) -> None:
    manifest = good_manifest()
    inner = manifest
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ProtocolError, match="manifest"):
        parse_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[1]", b"7", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="manifest"):
        parse_manifest(data)


def test_file_names_off_the_wire_are_taken_from_a_fixed_table() -> None:
    manifest = good_manifest()
    manifest["files"].update({"../../evil": [1, "0" * 64], "/etc/passwd": [1, "0" * 64], "modeling_x.py": "?"})
    assert set(parse_manifest(json.dumps(manifest).encode()).files) == {"config.json"}
