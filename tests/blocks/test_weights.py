"""Weights from files, tensor by tensor, into models that are cut."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedModel

from blocks.partition import Partition
from blocks.remote import build_edge, remote_of
from blocks.surgery import load
from blocks.weights import FileSource, TensorInfo, WeightSource, read_header
from messaging.errors import InputError
from tests.support.models import CONFIGS, CPU, MORE_CONFIGS, Alone, LocalMiddle, difference, make_engine, whole_model
from tests.support.weights import StateDictSource

PARTITION = Partition(2, 1)


@cache
def whole(name: str, tied: bool = False) -> PreTrainedModel:
    config = {**CONFIGS, **MORE_CONFIGS}[name]()
    config.tie_word_embeddings = tied
    return whole_model(config)


class Counting:
    """A source that notes what is read."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self.reads: list[str] = []
        self.names, self.info = source.names, source.info

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        self.reads.append(name)
        return self._source.read(name, dtype)


def saved(model: PreTrainedModel, folder: Path, shard: str = "1GB") -> FileSource:
    model.save_pretrained(folder, max_shard_size=shard)
    return FileSource(sorted(folder.glob("*.safetensors")))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "100KB"], ids=["single", "sharded"])
def test_an_edge_is_filled_from_files(tmp_path: Path, shard: str, tied: bool) -> None:
    model = whole("llama", tied)
    source = Counting(saved(model, tmp_path, shard))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "1GB")
    assert ("lm_head.weight" in source.names()) != tied
    edge = load(build_edge(model.config, PARTITION, torch.float32), source, torch.float32, CPU)
    remote_of(edge).attach(LocalMiddle(Alone(make_engine(model)), PARTITION))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert difference(edge.model(ids).logits, model(ids).logits) < 1e-5
    assert len(source.reads) == len(set(source.reads)), "a tensor is read once"
    layers = {name.split(".")[2] for name in source.reads if name.startswith("model.layers.")}
    assert layers == {"0", "1", "5"}, "what is not hosted is not read"
    shared = edge.model.lm_head.weight is edge.model.model.embed_tokens.weight
    assert shared == tied


def test_a_mixtures_checkpoint_is_fused_as_its_model_wants_it(tmp_path: Path) -> None:
    """Files hold each expert by itself, the model all experts in one tensor."""
    model = whole("mixtral")
    source = saved(model, tmp_path)
    assert any(".experts.3.w1." in name for name in source.names())
    edge = load(build_edge(model.config, PARTITION, torch.float32), source, torch.float32, CPU)
    own, other = dict(edge.model.named_parameters()), dict(model.named_parameters())
    assert own.keys() - other.keys() == set()
    assert all(torch.equal(value, other[edge.to_absolute(name)]) for name, value in own.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_values_are_converted_as_they_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {
        "half": torch.randn(7, 5).bfloat16(),
        "single": torch.randn(3),
        "count": torch.arange(4),
        "none": torch.ones(0, 3),
    }
    save_file(stored, tmp_path / "x.safetensors")
    source = FileSource([tmp_path / "x.safetensors"])
    for name in ("half", "single", "none"):
        assert torch.equal(source.read(name, dtype), stored[name].to(dtype))
    assert torch.equal(source.read("count", dtype), stored["count"]), "integers stay integers"
    assert source.info("half") == TensorInfo("half", torch.bfloat16, (7, 5))
    assert source.info("half").nbytes == 70


def test_conversion_goes_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.weights._PIECE", 64)
    value = torch.randn(37, 11)
    save_file({"x": value}, tmp_path / "x.safetensors")
    source = FileSource([tmp_path / "x.safetensors"])
    assert torch.equal(source.read("x", torch.bfloat16), value.bfloat16())
    assert torch.equal(source.read("x", torch.float32), value)


def test_bytes_can_be_read_from_any_offset(tmp_path: Path) -> None:
    save_file({"first": torch.zeros(3), "second": torch.arange(100, dtype=torch.uint8)}, tmp_path / "x.safetensors")
    buffer = bytearray(10)
    FileSource([tmp_path / "x.safetensors"]).read_bytes("second", 40, memoryview(buffer))
    assert list(buffer) == list(range(40, 50))


# -- what is wrong with files ----------------------------------------------------------------------------


def test_a_missing_tensor_is_named() -> None:
    tensors = dict(whole("llama").state_dict())
    del tensors["model.layers.5.mlp.up_proj.weight"]
    edge = build_edge(whole("llama").config, PARTITION, torch.float32)
    with pytest.raises(InputError, match=r"layers\.\d\.mlp\.up_proj"):
        load(edge, StateDictSource(tensors), torch.float32, CPU)


def test_a_missing_tensor_of_a_layer_that_is_not_hosted_does_not_matter() -> None:
    tensors = dict(whole("llama").state_dict())
    del tensors["model.layers.3.mlp.up_proj.weight"]
    load(build_edge(whole("llama").config, PARTITION, torch.float32), StateDictSource(tensors), torch.float32, CPU)


def test_a_tensor_of_another_shape_is_refused() -> None:
    config = whole("llama").config
    wider = LlamaConfig(**{**config.to_dict(), "intermediate_size": 100})
    source = StateDictSource(dict(whole("llama").state_dict()))
    with pytest.raises(InputError, match="do not fit LlamaForCausalLM"):
        load(build_edge(wider, PARTITION, torch.float32), source, torch.float32, CPU)


def test_a_file_that_ends_early_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.randn(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    source = FileSource([path])
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(InputError, match="cut short"):
            source.read("x", dtype)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01\x00",
        b"\xff" * 8,
        (200).to_bytes(8, "little") + b'{"x": ',
        (2).to_bytes(8, "little") + b"[]",
        (4).to_bytes(8, "little") + b"null",
        (3).to_bytes(8, "little") + b"not",
        *[
            len(header).to_bytes(8, "little") + header
            for header in (
                json.dumps({"x": entry}).encode()
                for entry in (
                    [],
                    {"dtype": "F32"},
                    {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]},
                    {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
                    {"dtype": "F32", "shape": [1], "data_offsets": []},
                    {"dtype": "F32", "shape": [1], "data_offsets": ["0", "x"]},
                    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
                    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
                )
            )
        ],
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="no readable safetensors file"):
        read_header(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.safetensors"):
        FileSource([tmp_path / "gone.safetensors"])
