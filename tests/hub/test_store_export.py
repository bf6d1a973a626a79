"""What `hub export` writes is what peft reads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from blocks.adapters import initial, make_spec
from hub.store.export import export_peft
from messaging.errors import InputError
from messaging.messages import Recipe

# peft 0.21 asks transformers 5.23 for an attribute by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.arange(24).reshape(2, 12)


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def make(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], Recipe, bool]:
    """An adapter with nothing at zero, and how it would have been trained."""
    spec = make_spec(model.config, 4, 12.0)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        name: torch.randn(value.shape, generator=generator) for name, value in initial(model.config, spec, 0).items()
    }
    return tensors, Recipe(1e-3, 4, 12.0, spec.targets, 20, 3, 2, 1.0, 0, 0.0, 7), spec.fan_in_fan_out


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    out: torch.Tensor = model(TOKENS).logits
    return out


@pytest.mark.parametrize("build", [llama, gpt2])
def test_peft_loads_it_and_computes_what_the_tensors_say(tmp_path: Path, build: type) -> None:
    tensors, recipe, fan_in_fan_out = make(build())
    export_peft(tensors, recipe, "some/base", tmp_path / "out", fan_in_fan_out)
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "out")).eval()

    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(recipe.target_modules), fan_in_fan_out=fan_in_fan_out)
    by_hand = get_peft_model(build(), config).eval()
    parameters = dict(by_hand.named_parameters())
    with torch.no_grad():
        for name, value in tensors.items():
            parameters[name.replace(".weight", ".default.weight")].copy_(value)
    assert sum("lora" in name for name in parameters) == len(tensors)
    assert torch.equal(logits(loaded), logits(by_hand))
    assert not torch.allclose(logits(loaded), logits(build()), atol=1e-3)


def test_the_folder_is_what_peft_itself_writes(tmp_path: Path) -> None:
    tensors, recipe, _ = make(llama())
    export_peft(tensors, recipe, "some/base", tmp_path / "ours")
    PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).save_pretrained(
        str(tmp_path / "theirs"), save_embedding_layers=False
    )
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() == tensors.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    assert configs[0]["base_model_name_or_path"] == "some/base"
    assert sorted(os.listdir(tmp_path / "ours")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_an_older_export_is_replaced_and_anything_else_is_not(tmp_path: Path) -> None:
    tensors, recipe, _ = make(llama())
    export_peft(tensors, recipe, "one", tmp_path / "out")
    export_peft({name: value + 1 for name, value in tensors.items()}, recipe, "two", tmp_path / "out")
    name = next(iter(tensors))
    assert torch.equal(load_file(tmp_path / "out" / "adapter_model.safetensors")[name], tensors[name] + 1)
    assert "two" in (tmp_path / "out" / "README.md").read_text()

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "README.md").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no adapter"):
        export_peft(tensors, recipe, "one", tmp_path / "thesis")
    assert os.listdir(tmp_path / "thesis") == ["README.md"]
    with pytest.raises(InputError, match="is a file"):
        export_peft(tensors, recipe, "one", tmp_path / "thesis" / "README.md")


def test_local_names_are_not_exported(tmp_path: Path) -> None:
    _, recipe, _ = make(llama())
    with pytest.raises(ValueError, match="no LoRA tensor"):
        export_peft({"model.layers.0.q_proj.lora_A.default.weight": torch.zeros(1)}, recipe, "one", tmp_path / "out")
    assert not (tmp_path / "out").exists()
