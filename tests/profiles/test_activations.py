"""What a layer keeps for backward, against what autograd really saves."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from profiles.activations import kept_bytes, kept_score_bytes
from profiles.model import shape_from_config
from profiles.workload import Workload

ROWS, SEQ, RANK = 2, 32, 4
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 8,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "gemma2": GROUPED | {"head_dim": 16},
    "gpt2": {"n_embd": 64, "n_head": 8, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_neox": SIZES,
    "llama": GROUPED,
    "mixtral": GROUPED | {"num_local_experts": 4},
    "opt": SIZES | {"ffn_dim": 176, "word_embed_proj_dim": 64},
    "phi3": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "starcoder2": GROUPED,
}


def saved_bytes(family: str, layers: int, dtype: torch.dtype) -> int:
    """Bytes of all tensors that autograd keeps in one forward pass, weights apart, each storage once."""
    settings = AutoConfig.for_model(family, **MODELS[family])
    settings.num_hidden_layers = layers
    settings.layer_types = ["full_attention"] * layers
    model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    targets = {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    lora = peft.LoraConfig(r=RANK, target_modules=sorted(targets - {"lm_head", "embed_out"}), task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora).eval()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=torch.ones(ROWS, SEQ, dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(MODELS))
def test_kept_bytes_equal_what_autograd_saves(family: str, dtype: str) -> None:
    # the difference of two depths is one layer, without embedding and head
    real = saved_bytes(family, 2, getattr(torch, dtype)) - saved_bytes(family, 1, getattr(torch, dtype))
    settings = AutoConfig.for_model(family, **MODELS[family])
    shape = shape_from_config(settings.to_dict())
    workload = Workload(ROWS, SEQ, dtype=dtype, lora_rank=RANK)
    predicted = ROWS * SEQ * kept_bytes(shape, workload) + kept_score_bytes(shape, ROWS, SEQ)
    assert predicted == pytest.approx(real, rel=0.12)
