"""LoRA on parts of a model: names, defaults, first values."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import get_peft_model_state_dict
from transformers import PreTrainedModel

from blocks import adapters
from blocks.adapters import LoraSpec
from blocks.middle import MiddleBlocks
from blocks.partition import Partition
from blocks.remote import build_edge
from blocks.surgery import load
from messaging.errors import InputError
from tests.support.models import CONFIGS, CPU, LAYERS, MORE_CONFIGS, make_engine, source_of, whole_model
from tests.support.training import Unsplit, starting_adapter

ALL = {**CONFIGS, **MORE_CONFIGS}
LLAMA_LIKE = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
ATTENTION = LLAMA_LIKE[:4]
NEOX_LIKE = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
DEFAULTS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "smollm3", "stablelm", "granite"), LLAMA_LIKE
    ),
    "phi3": ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "glm4": (*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj"),
    "starcoder2": (*ATTENTION, "mlp.c_fc", "mlp.c_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gptj": ("attn.k_proj", "attn.v_proj", "attn.q_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"),
    "opt": ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"),
    "gpt_neox": tuple(
        f"{part}.{name}" for part, name in zip(("attention",) * 2 + ("mlp",) * 2, NEOX_LIKE, strict=True)
    ),
    **dict.fromkeys(
        ("bloom", "falcon"),
        tuple(f"{part}.{name}" for part, name in zip(("self_attention",) * 2 + ("mlp",) * 2, NEOX_LIKE, strict=True)),
    ),
    # the experts are no linear modules, and their router is left alone
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
}


@cache
def whole(name: str) -> PreTrainedModel:
    return whole_model(ALL[name]())


@pytest.mark.parametrize("name", ALL)
def test_default_targets_are_the_linears_of_attention_and_mlp(name: str) -> None:
    assert adapters.make_spec(ALL[name](), 4, 8).targets == DEFAULTS[name]


@pytest.mark.parametrize("name", ALL)
def test_names_and_shapes_are_pefts_on_the_unsplit_model(name: str) -> None:
    spec = adapters.make_spec(whole(name).config, 4, 8)
    start = adapters.initial(whole(name).config, spec, seed=0)
    pefts = get_peft_model_state_dict(Unsplit(whole(name), spec, start, torch.optim.SGD, lr=0.0).model)
    assert {key: tuple(value.shape) for key, value in pefts.items()} == adapters.shapes(whole(name).config, spec)


@pytest.mark.parametrize("partition", [Partition(1, 0), Partition(2, 1), Partition(1, 3)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_edge_and_hub_name_their_layers_as_the_whole_model_does(name: str, partition: Partition) -> None:
    spec = adapters.make_spec(whole(name).config, 4, 8)
    adapter = starting_adapter(whole(name), spec)
    edge = load(build_edge(whole(name).config, partition, torch.float32), source_of(whole(name)), torch.float32, CPU)
    adapters.inject(edge, spec)
    adapters.write(edge, adapter)
    middle = MiddleBlocks(whole(name).config, partition.p, partition.leave(LAYERS), torch.float32)
    load(middle.cut, source_of(whole(name)), torch.float32, CPU)
    adapters.inject(middle.cut, spec, "other")
    adapters.write(middle.cut, adapter, "other")
    ours, theirs = adapters.read(edge), adapters.read(middle.cut, "other")
    assert not ours.keys() & theirs.keys()
    assert (ours | theirs).keys() == adapter.keys()
    assert all(torch.equal(value, adapter[key]) for key, value in (ours | theirs).items())
    kept = adapters.of_layers(adapter, edge.names, partition.p, partition.leave(LAYERS))
    assert kept.keys() == theirs.keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_are_float32_over_any_weights(dtype: torch.dtype) -> None:
    config = whole("llama").config
    spec = adapters.make_spec(config, 4, 8)
    edge = load(build_edge(config, Partition(1, 1), dtype), source_of(whole("llama")), dtype, CPU)
    adapters.inject(edge, spec)
    assert {value.dtype for value in adapters.parameters(edge).values()} == {torch.float32}
    assert edge.model.lm_head.weight.dtype == dtype


# -- first values --------------------------------------------------------------------------------------------


def test_the_first_adapter_depends_on_the_seed_alone() -> None:
    config = whole("llama").config
    spec = adapters.make_spec(config, 4, 8)
    one, again, other = (adapters.initial(config, spec, seed) for seed in (5, 5, 6))
    assert all(torch.equal(one[name], again[name]) for name in one)
    firsts = [name for name in one if name.endswith("lora_A.weight")]
    assert not any(torch.equal(one[name], other[name]) for name in firsts)
    assert len({float(one[name][0, 0]) for name in firsts}) == len(firsts)


def test_a_tensors_first_value_does_not_depend_on_what_else_is_made() -> None:
    config = whole("llama").config
    all_of_them = adapters.initial(config, adapters.make_spec(config, 4, 8), seed=1)
    few = adapters.initial(config, adapters.make_spec(config, 4, 8, ["q_proj"]), seed=1)
    assert all(torch.equal(value, all_of_them[name]) for name, value in few.items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_first_values_are_distributed_as_pefts(name: str) -> None:
    """A uniform within 1 / sqrt(inputs), B zero: the adapted model is the base model."""
    spec = adapters.make_spec(whole(name).config, 16, 8)
    for key, value in adapters.initial(whole(name).config, spec, seed=0).items():
        bound = 1 / value.shape[1] ** 0.5
        if key.endswith("lora_B.weight"):
            assert not value.any()
        else:
            assert 0.95 * bound < float(value.abs().max()) <= bound
            assert abs(float(value.mean())) < 0.1 * bound


# -- what is refused -----------------------------------------------------------------------------------------


def test_a_target_that_is_not_there_is_told_with_those_that_are() -> None:
    with pytest.raises(InputError, match=r"--target-modules c_attn: no such module.*self_attn\.q_proj"):
        adapters.make_spec(whole("llama").config, 4, 8, ["q_proj", "c_attn"])
    with pytest.raises(InputError, match="no such module"):
        adapters.make_spec(whole("llama").config, 4, 8, ["lm_head"])


def test_a_target_that_peft_takes_for_the_experts_is_refused() -> None:
    with pytest.raises(InputError, match=r"gate_proj: peft takes this name for the experts.*self_attn\.q_proj"):
        adapters.make_spec(whole("qwen3_moe").config, 4, 8, ["q_proj", "gate_proj"])


def test_targets_are_suffixes_of_whole_names() -> None:
    spec = adapters.make_spec(whole("opt").config, 4, 8, ["k_proj", "fc1"])
    assert spec.targets == ("k_proj", "fc1")
    assert len(adapters.shapes(whole("opt").config, spec)) == LAYERS * 2 * 2


def test_an_adapter_of_another_rank_is_refused() -> None:
    config = whole("llama").config
    hub = make_engine(whole("llama"))
    with pytest.raises(InputError, match="another rank or model"):
        hub.set_trained(adapters.initial(config, adapters.make_spec(config, 8, 8), seed=0))
    with pytest.raises(InputError, match="another rank or model"):
        hub.set_trained({})


def test_a_part_without_targets_gets_no_adapter() -> None:
    config = whole("llama").config
    edge = build_edge(config, Partition(1, 0), torch.float32)
    assert adapters.inject(edge, LoraSpec(4, 8, ("no_such",))) is None
    assert adapters.parameters(edge) == {}


def test_a_name_without_a_layer_is_refused() -> None:
    names = build_edge(whole("llama").config, Partition(1, 0), torch.float32).names
    assert adapters.layer_of("base_model.model.model.layers.11.mlp.up_proj.lora_A.weight", names) == 11
    with pytest.raises(InputError, match="no layer"):
        adapters.layer_of("base_model.model.lm_head.lora_A.weight", names)
