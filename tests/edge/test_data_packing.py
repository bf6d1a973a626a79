"""Packed rows give each example's own logits and loss, for every model that is said to pack exactly."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edge.data import PACKS_EXACTLY, Batch, Example
from edge.data.batches import collate

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: What a model needs beside SMALL; a sliding window shorter than a row, where there is one.
OTHERS = {
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gptj": {"rotary_dim": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
SIZES = ((9, 4, 3), (2, 7), (6,))


def model_of(model_type: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SMALL, **OTHERS.get(model_type, {}))
    return AutoModelForCausalLM.from_config(config).eval()


def packed_rows() -> tuple[list[tuple[Example, ...]], Batch]:
    draw = np.random.default_rng(1)
    rows = []
    for sizes in SIZES:
        ids = [draw.integers(3, 97, size).astype(np.int32) for size in sizes]
        rows.append(tuple(Example(i, np.where(np.arange(len(i)) < len(i) // 2, -100, i)) for i in ids))
    return rows, collate(rows, packing=True, pad_id=0)


def alone(model: torch.nn.Module, example: Example):
    ids, labels = (torch.from_numpy(array).long()[None] for array in (example.input_ids, example.labels))
    return model(input_ids=ids, labels=labels, use_cache=False)


def differences(model_type: str) -> tuple[float, float]:
    """Packed against alone: the largest |a - b| / max |b| of the logits, and that of the summed loss."""
    model = model_of(model_type)
    rows, batch = packed_rows()
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids, labels=batch.labels, use_cache=False)
        worst, loss = 0.0, 0.0
        for at, row in enumerate(rows):
            start = 0
            for example in row:
                own = alone(model, example)
                logits = packed.logits[at, start : start + len(example)]
                worst = max(worst, float((logits - own.logits[0]).abs().max() / own.logits.abs().max()))
                loss += float(own.loss) * example.targets
                start += len(example)
    return worst, abs(float(packed.loss) * batch.tokens / loss - 1)


@pytest.mark.parametrize("model_type", sorted(PACKS_EXACTLY))
def test_packed_logits_and_loss_equal_those_of_each_example_alone(model_type):
    logits, loss = differences(model_type)
    assert logits < 1e-5
    assert loss < 1e-5


def test_model_whose_mask_does_not_follow_the_positions_is_not_in_the_list():
    assert "opt" not in PACKS_EXACTLY
    assert differences("opt")[0] > 1e-2
