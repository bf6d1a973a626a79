"""A model from a folder or from the Hugging Face hub: what is read of it, and what is said when it cannot be."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from blocks.manifest import check_against, make_manifest, parse_manifest
from blocks.partition import Partition
from blocks.remote import build_edge
from blocks.source import open_model
from blocks.surgery import load
from messaging.errors import InputError
from tests.support.folders import edit_json, sharded_model, single_model, stored, watch_reads

REPO = Path(__file__).resolve().parents[2]
STORIES = REPO.parent / "shared" / "data" / "llama-stories260K-hf"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a local folder needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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
