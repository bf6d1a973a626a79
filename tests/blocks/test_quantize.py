"""Weights in 8 and 4 bits: what they compute, what they take, and how they are loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import cast

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig

from blocks import adapters, quantize
from blocks.decoding import speed_up_decoding
from blocks.partition import Partition
from blocks.quantize import QuantizedLinear, held_bytes, parse_bits, quantizable
from blocks.remote import build_edge, remote_of
from blocks.surgery import CutModel, load
from blocks.weights import TensorInfo, WeightSource
from edge.data import Batch
from edge.middle import HubMiddle
from edge.noise import GaussianNoise
from edge.pipeline import Pipeline
from messaging.errors import InputError
from tests.support.models import CONFIGS, CPU, MORE_CONFIGS, source_of, whole_model
from tools.bench_memory import Echo

pytest.importorskip("torchao.quantization")
BITS = [8, 4]
#: The largest error of a weight, relative to the largest weight of what shares its scale.
ERROR = {8: 0.5 / 127 * 1.01, 4: 0.16}


def random_linear(inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 172), (176, 64), (300, 7), (64, 512)])
def test_a_weight_comes_back_as_good_as_its_bits_allow(
    bits: int, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SLAB", 4096)
    linear = random_linear(inputs, outputs)
    held = QuantizedLinear(linear.weight, None, bits)
    assert held.weight.shape == linear.weight.shape
    error = (held.weight - linear.weight).abs().max() / linear.weight.abs().max()
    assert 0 < error < ERROR[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_and_gradients_are_those_of_the_dequantized_weight(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SLAB", 4096)
    linear = random_linear(96, 200, bias=True, dtype=dtype)
    held = QuantizedLinear(linear.weight, linear.bias, bits)
    assert held.weight.dtype == dtype
    states = torch.randn(2, 5, 96, dtype=dtype)
    results = []
    for weight in (None, held.weight):
        given = states.clone().requires_grad_()
        out = held(given) if weight is None else nn.functional.linear(given, weight, linear.bias)
        (out.float() ** 2).sum().backward()
        results.append((out.detach().float(), given.grad.float()))
    close = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for mine, wanted in zip(*results, strict=True):
        assert (mine - wanted).abs().max() < close * wanted.abs().max()


@pytest.mark.parametrize(("bits", "most"), [(8, 1.02), (4, 0.53)])
def test_what_it_takes(bits: int, most: float) -> None:
    held = QuantizedLinear(random_linear(1024, 2050, dtype=torch.bfloat16).weight, None, bits)
    assert held.nbytes == sum(held_bytes(slab) for slab in held.buffers()) <= most * 1024 * 2050


@pytest.mark.parametrize("bits", BITS)
def test_nothing_in_full_is_kept_for_the_backward(bits: int) -> None:
    held = QuantizedLinear(random_linear(256, 256).weight, None, bits)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda _: None):
        held(torch.randn(3, 256, requires_grad=True)).sum()
    assert sum(kept) < 256 * 256 / 10


def test_a_row_of_zeros_is_not_a_number_out_of_nothing() -> None:
    linear = random_linear(64, 300)
    linear.weight[5:300] = 0
    for bits in BITS:
        weight = QuantizedLinear(linear.weight, None, bits).weight
        assert weight.isfinite().all()
        assert weight[5:].abs().max() < 0.02 * linear.weight.abs().max()


# -- in a model ------------------------------------------------------------------------------------------


def edge(name: str, bits: int | None) -> CutModel:
    whole = whole_model({**CONFIGS, **MORE_CONFIGS}[name]())
    cut = load(build_edge(whole.config, Partition(1, 1), torch.float32), source_of(whole), torch.float32, CPU, bits)
    remote_of(cut).attach(Echo())
    return cut


def with_lora(cut: CutModel) -> CutModel:
    adapters.inject(cut, adapters.make_spec(cut.model.config, 2, 4))
    torch.manual_seed(1)
    for parameter in adapters.parameters(cut).values():
        parameter.requires_grad_().data.normal_(0, 0.05)
    return cut


def dequantized(cut: CutModel, name: str) -> CutModel:
    """The float model with the weights that `cut` computes with."""
    other = edge(name, None)
    for path, module in cut.model.named_modules():
        if isinstance(module, QuantizedLinear):
            other.model.get_submodule(path).weight.data = module.weight
    return other


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "gptj", "opt", "qwen3_moe", "phi3"])
def test_lora_trains_on_it_as_on_the_dequantized_model(name: str, bits: int) -> None:
    quantized = edge(name, bits)
    other = with_lora(dequantized(quantized, name))
    with_lora(quantized)
    ids = torch.randint(3, 120, (2, 10), generator=torch.Generator().manual_seed(3))
    batch = Batch(ids, ids, None, None, 18)
    values, grads = [], []
    for cut in (quantized, other):
        pipeline = Pipeline(cut, cast(HubMiddle, remote_of(cut).middle), GaussianNoise(0.0, b""), 1)
        values.append(pipeline.step(0, [batch], lambda: None).loss)
        grads.append({key: p.grad for key, p in adapters.parameters(cut).items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    assert grads[0].keys() == grads[1].keys() != set()
    for key, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][key], rtol=1e-3, atol=1e-5 * float(grads[1][key].abs().max())), key


def test_the_head_too_but_never_the_embedding() -> None:
    cut = edge("llama", 8)
    assert isinstance(cut.model.get_output_embeddings(), QuantizedLinear)
    assert type(cut.model.get_input_embeddings()) is nn.Embedding
    tied = edge("gemma2", 8)
    assert type(tied.model.get_output_embeddings()) is nn.Linear
    assert tied.model.get_output_embeddings().weight is tied.model.get_input_embeddings().weight
    assert "lm_head.weight" not in quantizable(tied.model)


def test_the_head_keeps_what_comes_before_it() -> None:
    head = edge("llama", 8).model.get_output_embeddings()
    assert [hook.__name__ for hook in head._forward_pre_hooks.values()] == ["_packed"]


def test_speeding_decoding_up_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = edge("llama", 8)
    monkeypatch.setattr(QuantizedLinear, "weight", property(lambda self: pytest.fail("made in full")))
    speed_up_decoding(cut.layers)


def test_a_model_without_plain_linears_is_refused() -> None:
    config = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=120, n_positions=64)
    with pytest.raises(InputError, match="--load-in 8bit: GPT2LMHeadModel keeps its weights in no plain linear"):
        load(build_edge(config, Partition(1, 1), torch.float32), source_of(whole_model(config)), torch.float32, CPU, 8)


class Counting:
    """Weights out of nothing; `most`: the values of those that were alive at once, the embedding apart."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self.alive, self.most = 0, 0

    def names(self) -> Iterable[str]:
        return self._shapes

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(name, torch.float32, self._shapes[name])

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        return _Watched.of(torch.randn(self._shapes[name]), self if "embed" not in name else None)


class _Watched(torch.Tensor):
    """A tensor that its source is told the end of."""

    @staticmethod
    def of(tensor: torch.Tensor, source: Counting | None) -> torch.Tensor:
        if source is not None:
            import weakref

            size = tensor.numel()
            source.alive += size
            source.most = max(source.most, source.alive)

            def gone() -> None:
                source.alive -= size

            weakref.finalize(tensor.untyped_storage(), gone)
        return tensor


@pytest.mark.parametrize("bits", BITS)
def test_loading_holds_one_weight_in_full_at_a_time(bits: int) -> None:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, vocab_size=500
    )
    whole = whole_model(config)
    source: WeightSource = Counting({name: tuple(value.shape) for name, value in whole.state_dict().items()})
    load(build_edge(config, Partition(1, 1), torch.float32), source, torch.float32, CPU, bits)
    norms = 5 * 64
    assert source.most <= 500 * 64 + norms  # the head's


# -- asking for it ---------------------------------------------------------------------------------------


def test_what_can_be_asked_for() -> None:
    assert [parse_bits(name) for name in (None, "8bit", "4bit")] == [None, 8, 4]
    with pytest.raises(InputError, match="--load-in 3bit: give 8bit or 4bit"):
        parse_bits("3bit")


@pytest.mark.parametrize("module", [None, type(sys)("torchao.quantization")])
def test_a_missing_or_unfit_library_is_named(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    with pytest.raises(InputError, match=r"--load-in 4bit needs torchao .* pip install 'fedsea\[quantized\]'"):
        parse_bits("4bit")
