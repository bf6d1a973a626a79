"""The memory prediction: the parts that can be counted by hand, and how the others move."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blocks import quantize
from edge import allocator, loss
from profiles import memory
from profiles.errors import PlanError
from profiles.memory import MemoryPrediction, predict_memory, predict_unsplit
from profiles.model import ModelShape, shape_from_config
from profiles.workload import Workload

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
}
LAYER = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3 + 128
ENDS = 2 * 500 * 64 + 64
ADAPTERS_PER_RANK = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 160) * 3
MODEL = shape_from_config(CONFIG)
TRAINING = Workload(batch=4, seq=32, dtype="float32", lora_rank=2)
GENERATION = replace(TRAINING, training=False)


def predict(
    p: int = 1, q: int = 1, workload: Workload = TRAINING, model: ModelShape = MODEL, micro_batches: int = 1
) -> MemoryPrediction:
    return predict_memory(model, p, q, workload, "cpu", micro_batches)


@pytest.mark.parametrize(("p", "q", "layers"), [(1, 0, 1), (1, 1, 2), (3, 2, 5)])
def test_weights_and_adapters_are_counted_exactly(p: int, q: int, layers: int) -> None:
    prediction = predict(p, q)
    assert prediction.weights == 4 * (ENDS + layers * LAYER)
    # weights, gradients and two moments, all float32
    assert prediction.adapters == 4 * 4 * 2 * layers * ADAPTERS_PER_RANK


def test_sixteen_bit_halves_weights_and_not_adapters() -> None:
    half = predict(workload=replace(TRAINING, dtype="bfloat16"))
    assert half.weights * 2 == predict().weights
    assert half.adapters == predict().adapters


def test_a_tied_head_is_counted_once() -> None:
    tied = shape_from_config(CONFIG | {"tie_word_embeddings": True})
    assert predict().weights - predict(model=tied).weights == 4 * 500 * 64


def test_counts_that_a_caller_knows_take_the_place_of_derived_ones() -> None:
    exact = replace(MODEL, layer_params=(1000, 1, 1, 1, 1, 2000), embed_params=10, head_params=20)
    assert predict(1, 1, model=exact).weights == 4 * 3030
    assert predict(2, 0, model=exact).weights == 4 * 1031


def test_the_logits_of_a_training_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # the log-softmax and two gradients of it, float32 whatever the weights are, and the gradient by the states
    assert predict().logits == 3 * 4 * (4 * 32 * 500) + 4 * (4 * 32 * 64)
    assert predict(workload=replace(TRAINING, dtype="bfloat16")).logits == 3 * 4 * (4 * 32 * 500) + 2 * (4 * 32 * 64)
    capped = shape_from_config(CONFIG | {"final_logit_softcapping": 30.0})
    assert predict(model=capped).logits == 4 * 4 * (4 * 32 * 500) + 4 * (4 * 32 * 64)
    monkeypatch.setattr(memory, "PIECE", 50 * 500)
    assert predict().logits == 3 * 4 * (50 * 500) + 4 * (4 * 32 * 64)


def test_the_unsplit_model_hosts_all_and_takes_its_loss_in_the_whole() -> None:
    whole = predict_unsplit(MODEL, TRAINING, "cpu")
    assert whole.weights == 4 * (ENDS + 6 * LAYER)
    assert whole.logits == 4 * 4 * (4 * 32 * 500)
    assert whole.wire == 0


@pytest.mark.parametrize(("bits", "size"), [(8, 1 + 5 / 2048), (4, 0.5 + 1 / 64 + 4 / 16384)])
def test_linear_layers_in_fewer_bits(bits: int, size: float) -> None:
    linears = 2 * (LAYER - 128) + 500 * 64
    quantized = predict(workload=replace(TRAINING, bits=bits))
    assert quantized.weights == int(linears * size) + 4 * (ENDS + 2 * LAYER - linears)
    assert quantized.dequantized == 160 * 64 * 20 + 4 * 32 * 160 * 4
    assert predict().dequantized == 0
    tied = shape_from_config(CONFIG | {"tie_word_embeddings": True})
    # the head is the embedding then, and stays
    fewer = predict(model=tied, workload=replace(TRAINING, bits=bits)).weights
    assert quantized.weights - fewer == pytest.approx(500 * 64 * size, abs=1)


def test_conv1d_is_not_quantized() -> None:
    gpt2 = shape_from_config({"model_type": "gpt2", "n_embd": 64, "n_layer": 6, "n_head": 4, "vocab_size": 500,
                              "n_positions": 64})  # fmt: skip
    assert predict(model=gpt2, workload=replace(TRAINING, bits=8)).weights == predict(model=gpt2).weights


def test_the_constants_are_those_of_the_edge() -> None:
    assert memory.PIECE == loss.PIECE
    assert memory.MMAP_BYTES == allocator.APART_BYTES
    assert memory.SLAB == {"cpu": quantize.SLAB, "cuda": quantize.GPU_SLAB, "mps": quantize.GPU_SLAB}


def test_generation_needs_a_cache_and_no_gradients() -> None:
    prediction = predict(workload=GENERATION)
    # keys and values of two layers, for every token of every row
    assert prediction.cache == 2 * 2 * 32 * (4 * 32) * 4
    assert prediction.adapters == 4 * 2 * 2 * ADAPTERS_PER_RANK
    assert prediction.total < predict().total
    assert predict().cache == 0


def test_the_total_is_the_sum_of_its_parts() -> None:
    prediction = predict()
    assert prediction.total == sum(prediction.parts().values())
    assert set(prediction.parts()) == {
        "weights", "adapters", "activations", "logits", "cache", "wire", "holes", "runtime", "dequantized",
    }  # fmt: skip


@pytest.mark.parametrize("workload", [TRAINING, GENERATION])
def test_more_of_anything_needs_more(workload: Workload) -> None:
    least = predict(workload=workload).total
    assert predict(p=2, workload=workload).total > least
    assert predict(q=2, workload=workload).total > least
    assert predict(workload=replace(workload, batch=8)).total > least
    assert predict(workload=replace(workload, seq=64)).total > least
    assert predict(workload=replace(workload, lora_rank=4)).total > least


def test_micro_batches_divide_what_a_row_needs_and_nothing_else() -> None:
    whole, split = predict(), predict(micro_batches=4)
    assert split.weights == whole.weights
    assert split.adapters == whole.adapters
    assert split.logits * 4 == whole.logits
    assert split.activations * 4 == whole.activations
    # three parts of four rows are two, one and one: the largest counts
    assert predict(micro_batches=3).logits * 2 == whole.logits


def test_only_the_cpu_allocator_loses_much_to_holes() -> None:
    on_gpu = predict_memory(MODEL, 1, 1, TRAINING, "cuda")
    assert on_gpu.holes < predict().holes / 5
    # tensors of 4 MiB and more come straight from the system, whichever layer they are in
    huge = replace(MODEL, vocab=64_000)
    wide = predict(workload=replace(TRAINING, batch=4096, seq=512), model=huge)
    assert wide.holes == 0


def test_auto_is_no_dtype() -> None:
    with pytest.raises(PlanError, match="still 'auto'"):
        predict(workload=Workload(batch=1, seq=1))
