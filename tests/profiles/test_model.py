"""Shapes from configs, against the real classes of transformers on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from profiles.errors import ProfileError
from profiles.model import shape_from_config

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
OLD_NAMES = {
    "n_embd": 64,
    "n_inner": 176,
    "n_layer": 3,
    "n_head": 8,
    "vocab_size": 100,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 8, "vocab_size": 100},
    "cohere": GROUPED,
    "falcon": {key: value for key, value in SIZES.items() if key != "intermediate_size"},
    "gemma": WIDE,
    "gemma2": WIDE,
    "gemma3_text": WIDE,
    "glm4": WIDE,
    "gpt2": OLD_NAMES,
    "gpt_neox": SIZES,
    "gptj": OLD_NAMES | {"rotary_dim": 4},
    "granite": GROUPED,
    "llama": GROUPED,
    "mistral": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "olmo2": GROUPED,
    "opt": SIZES | {"ffn_dim": 176, "word_embed_proj_dim": 64},
    "phi": SIZES,
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "qwen3_moe": WIDE | {"num_experts": 4, "moe_intermediate_size": 96},
    "smollm3": GROUPED,
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
}


def config_of(family: str) -> Any:
    return AutoConfig.for_model(family, **MODELS[family])


@pytest.mark.parametrize("family", sorted(MODELS))
def test_counts_equal_the_real_model(family: str) -> None:
    config = config_of(family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 3)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    in_layers = [sum(weight.numel() for weight in layer.parameters()) for layer in layers]

    shape = shape_from_config(config.to_dict())

    assert list(shape.layer_params) == in_layers
    assert shape.tied == (embedding is head)
    total = sum(weight.numel() for weight in model.parameters())
    assert shape.embed_params + sum(shape.layer_params) + shape.head_params == total
    linears = [m for m in layers[0].modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    widths = sorted(tuple(sorted(linear.weight.shape)) for linear in linears)
    assert sorted(tuple(sorted(pair)) for pair in shape.adapted) == widths


def test_a_token_uses_a_part_of_a_mixture() -> None:
    shape = shape_from_config(config_of("mixtral").to_dict())
    unused = 2 * 3 * 64 * 176  # two of the four experts, three linears each
    assert shape.active_share == pytest.approx(1 - unused / shape.layer_params[0])
    assert shape_from_config(config_of("llama").to_dict()).active_share == 1


def test_an_unknown_family_counts_as_llama() -> None:
    config = GROUPED | {"tie_word_embeddings": False}
    assert shape_from_config(config | {"model_type": "new"}) == shape_from_config(config | {"model_type": "llama"})


def test_the_text_part_of_a_larger_config() -> None:
    assert shape_from_config({"model_type": "gemma3", "text_config": WIDE}).hidden == 64


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("hidden_size", r"does not say its hidden: looked for hidden_size, n_embd"),
        ("num_hidden_layers", r"its layers"),
        ("vocab_size", r"its vocab"),
    ],
)
def test_a_config_without_a_size(missing: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        shape_from_config({key: value for key, value in SIZES.items() if key != missing})
