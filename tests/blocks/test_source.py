"""A model from a folder or from the Hugging Face hub: what is read of it, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from blocks.manifest import check_against, make_manifest, model_hash, parse_manifest
from blocks.partition import Partition
from blocks.remote import build_edge
from blocks.source import open_model
from blocks.surgery import load
from messaging.errors import InputError, ProtocolError
from tests.support.folders import sharded_model, single_model, stored, watch_reads

REPO = Path(__file__).resolve().parents[2]
STORIES = REPO.parent / "shared" / "data" / "llama-stories260K-hf"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def edit_json(path: Path, **changes: Any) -> None:
    fields = json.loads(path.read_bytes())
    fields.update(changes)
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


# --- local folders ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [single_model, sharded_model])
@pytest.mark.usefixtures("no_network")
def test_a_folder_gives_weights_config_and_tokenizer(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    model = open_model(str(make(tmp_path / "m")))
    assert model.name == str(tmp_path / "m")
    assert model.config.num_hidden_layers == 4
    assert set(model.files) == {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert model.generation_config().eos_token_id == 2
    tokenizer = model.tokenizer()
    assert tokenizer.decode(tokenizer("Zoë, 37.5°C").input_ids) == "Zoë, 37.5°C"
    expected = stored(tmp_path / "m")
    assert set(model.source.names()) == set(expected)
    for name, value in expected.items():
        assert model.source.info(name).shape == tuple(value.shape)
        assert torch.equal(model.source.read(name, torch.float32), value)


def test_the_name_of_a_folder_is_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    single_model(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    assert open_model("m").name == open_model("./m/").name == str(tmp_path / "m")


def test_bf16_weights_are_read_as_float32(tmp_path: Path) -> None:
    source = open_model(str(sharded_model(tmp_path / "m", torch.bfloat16))).source
    for name, value in stored(tmp_path / "m").items():
        assert source.info(name).dtype == torch.bfloat16
        assert torch.equal(source.read(name, torch.float32), value.float())


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1), (torch.bfloat16, 4)])
def test_threads_convert_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, most: int
) -> None:
    source = open_model(str(sharded_model(tmp_path / "m", torch.bfloat16))).source
    watched = watch_reads(monkeypatch)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda name: source.read(name, dtype), [*source.names()] * 4))
    assert watched() == most


def test_only_shards_with_a_tensor_that_is_hosted_are_opened(tmp_path: Path) -> None:
    folder = sharded_model(tmp_path / "m")
    index = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    outer = {shard for name, shard in index.items() if "layers." not in name or ".0." in name or ".3." in name}
    inner = set(index.values()) - outer
    assert inner, "the model is too small for this test"
    for shard in inner:
        (folder / shard).unlink()
    model = open_model(str(folder))
    cut = load(
        build_edge(model.config, Partition(1, 1), torch.float32), model.source, torch.float32, torch.device("cpu")
    )
    assert torch.equal(cut.model.state_dict()[EMBEDDING], stored(folder)[EMBEDDING])
    missing = next(name for name, shard in index.items() if shard in inner)
    with pytest.raises(InputError, match=f"lacks {index[missing]}.*download the model again"):
        model.source.read(missing, torch.float32)


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared/data/llama-stories260K-hf is not beside this repository")
@pytest.mark.usefixtures("no_network")
def test_a_real_pretrained_model() -> None:
    model = open_model(str(STORIES))
    assert len(list(model.source.names())) > 40
    tokenizer = model.tokenizer()
    assert tokenizer.decode(tokenizer("Once upon a time").input_ids, skip_special_tokens=True).strip() == (
        "Once upon a time"
    )
    manifest = make_manifest(model)
    check_against(parse_manifest(manifest), model, model.source.names())


# --- errors -----------------------------------------------------------------------------------


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def foreign_index(folder: Path) -> None:
    edit = {"weight_map": {EMBEDDING: "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(edit))


def promised(folder: Path) -> None:
    edit = {"weight_map": {EMBEDDING: "model.safetensors", "ghost": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(edit))


def config_with(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


AUTO_MAP = {"AutoConfig": "configuration_x.XConfig"}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not readable as JSON"),
        (lambda folder: (folder / "config.json").write_text("[" * 200_000), "not readable as JSON"),
        (config_with(model_type=None), "names no model_type"),
        (config_with(model_type="fancy"), "knows no models of type 'fancy': update"),
        (config_with(model_type="fancy", auto_map=AUTO_MAP), "needs code of its own"),
        (config_with(model_type="t5"), "no causal language model"),
        (config_with(quantization_config={"quant_method": "gptq"}), "is quantized"),
        (config_with(num_hidden_layers="many"), "cannot use its config.json"),
        (only_bin, r"\.bin and not as safetensors: convert"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "no readable safetensors file"),
        (foreign_index, "names files that are no safetensors beside it"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "no index"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    folder = single_model(tmp_path / "m")
    damage(folder)
    with pytest.raises(InputError, match=message) as raised:
        open_model(str(folder))
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("name", ["./gone", "/gone/model", "~/gone", "a/b/c", "gone/", "~nobody/x"])
@pytest.mark.usefixtures("no_network")
def test_a_folder_that_is_not_there_is_not_looked_for_elsewhere(name: str) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        open_model(name)


@pytest.mark.usefixtures("no_network")
def test_an_empty_name_is_not_the_folder_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single_model(tmp_path / "m"))
    with pytest.raises(InputError, match="has no name"):
        open_model("")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InputError, match="is a file: give the folder"):
        open_model(str(tmp_path / "model.safetensors"))


def test_an_index_may_not_promise_what_its_files_lack(tmp_path: Path) -> None:
    folder = single_model(tmp_path / "m")
    promised(folder)
    source = open_model(str(folder)).source
    source.read(EMBEDDING, torch.float32)
    with pytest.raises(InputError, match="lacks the tensor ghost"):
        source.read("ghost", torch.float32)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = single_model(tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    edit_json(folder / "tokenizer_config.json", tokenizer_class="XTokenizer", auto_map={"AutoTokenizer": ["x.X", None]})
    (folder / "x.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="cannot make the tokenizer"):
        open_model(str(folder)).tokenizer()


def test_a_config_cannot_choose_a_kernel_to_fetch(tmp_path: Path) -> None:
    folder = single_model(tmp_path / "m")
    edit_json(folder / "config.json", attn_implementation="somebody/kernel", _experts_implementation="somebody/kernel")
    config = open_model(str(folder)).config
    assert config._attn_implementation is None
    assert config._experts_implementation is None


def test_without_a_generation_config_the_models_config_serves(tmp_path: Path) -> None:
    folder = single_model(tmp_path / "m")
    (folder / "generation_config.json").unlink()
    assert open_model(str(folder)).generation_config().eos_token_id == 2


# --- manifest ---------------------------------------------------------------------------------


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


# --- the Hugging Face hub ---------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAMES = ("good/model", "gone/model", "gated/model", "bin/model", "not a name")


class FakeHub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's protocol as its client needs to download files."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2])
        folder = self.root / repo
        if not folder.is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/") and "/tree/" in path:
            tree = [
                {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": f"{item.name:a<40}"[:40]}
                for item in folder.iterdir()
            ]
            self._answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/models/"):
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": item.name} for item in folder.iterdir()]}
            self._answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
        else:
            self._file(folder / path.rpartition("/")[2], body)

    def _file(self, path: Path, body: bool) -> None:
        if path.parts[-3:-1] == ("gated", "model"):
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        elif not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        else:
            if body:
                self.asked.append(path.name)
            self._answer(200, path.read_bytes(), {"X-Repo-Commit": COMMIT, "ETag": f'"{path.name}"'}, body)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def fake_hub(root: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (FakeHub,), {"root": root, "asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", handler.asked  # type: ignore[attr-defined]
        finally:
            server.shutdown()
            thread.join()


#: Runs in a process of its own: the client reads its settings when it is imported.
OPEN_ALL = """
import json, sys, torch
from blocks.source import open_model
from messaging.errors import InputError
said = {}
for name in sys.argv[1:]:
    try:
        model = open_model(name)
        value = model.source.read("model.embed_tokens.weight", torch.float32)
        said[name] = [model.name, len(list(model.source.names())), float(value.sum()), len(model.tokenizer())]
    except InputError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def open_all(home: Path, endpoint: str, *names: str) -> dict[str, Any]:
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, *names], cwd=REPO, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_a_model_of_the_hugging_face_hub_is_downloaded_as_far_as_it_is_read(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    for name in ("good", "gated", "bin"):
        sharded_model(root / name / "model")
    for path in [*(root / "bin" / "model").glob("*.safetensors*")]:
        path.unlink()
    with fake_hub(root) as (endpoint, asked):
        said = open_all(tmp_path / "home", endpoint, *NAMES)
    tensors = stored(root / "good" / "model")
    assert said["good/model"] == ["good/model", len(tensors), pytest.approx(float(tensors[EMBEDDING].sum())), 259]
    assert [name for name in asked if name.endswith(".safetensors")] == ["model-00001-of-00006.safetensors"]
    assert "no such model on the Hugging Face hub" in said["gone/model"]
    assert "is gated: ask for access at https://huggingface.co/gated/model" in said["gated/model"]
    assert "has no such file" in said["bin/model"]
    assert "neither a folder here nor a name" in said["not a name"]

    # The hub is gone now: what was downloaded is still there, and nothing else is.
    said = open_all(tmp_path / "home", endpoint, "good/model", "other/model")
    assert said["good/model"][1] == len(tensors)
    assert "cannot be reached" in said["other/model"]
