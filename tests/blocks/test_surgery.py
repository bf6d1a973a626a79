"""Cutting and laying out a model's modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from blocks.surgery import store_by_columns
from tests.support.models import CONFIGS


@pytest.mark.parametrize("tied", [False, True])
def test_weights_by_columns_are_the_same_weights(tied: bool) -> None:
    config = CONFIGS["llama"]()
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(10, 19)[None]
    with torch.no_grad():
        before, weights = model(ids).logits, {name: value.clone() for name, value in model.state_dict().items()}
        store_by_columns([*model.model.layers, model.get_output_embeddings()])
        after = model(ids).logits
    head = model.get_output_embeddings().weight
    assert head.stride() == (1, head.shape[0])
    assert model.model.layers[0].mlp.up_proj.weight.stride()[0] == 1
    assert (head is model.get_input_embeddings().weight) is tied
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(after, before)


def test_only_float32_weights_on_the_cpu_are_laid_out_by_columns() -> None:
    half, none = nn.Linear(4, 6, dtype=torch.bfloat16), None
    store_by_columns([half, none])
    assert half.weight.stride() == (4, 1)
