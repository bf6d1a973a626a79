"""How many values a decoder layer keeps for its backward pass, and how many it allocates and frees on the way.

Counted operation by operation with LoRA on frozen weights: a frozen linear does not keep its input, its adapter
does. Adapters are float32; over 16-bit weights each adapter therefore keeps a float32 copy of its own, where
adapters over float32 weights share one. The counts agree with torch.autograd.graph.saved_tensors_hooks on every
family in tests/profiles/test_activations.py.
"""

from __future__ import annotations

from profiles.model import ModelShape
from profiles.workload import Workload

FLOAT32 = 4


def kept_bytes(model: ModelShape, workload: Workload) -> int:
    """Bytes that one layer keeps for backward, for one token. What attention keeps per pair of tokens comes extra."""
    size = workload.value_bytes
    inner = model.inner * model.experts_per_token
    # queries, keys, values and the attention's output; then what lies between the MLP's linears
    values = 2 * model.attention_width + 2 * model.kv_width + _mlp_kept(model) * inner
    if model.family.qk_norm:
        values += model.attention_width + model.kv_width
    if model.family.fused_qkv and model.family.rotary:
        # queries and keys are turned into new tensors, and the values hold on to the tensor of all three
        values += model.attention_width + model.kv_width
    # the residual stream before each norm: an RMSNorm works in float32, a LayerNorm in the dtype of the weights
    norm_inputs = model.family.norms * model.hidden * (FLOAT32 if model.family.rms else size)
    middles = len(model.adapted) * workload.lora_rank * FLOAT32
    softmax_sums = model.heads * FLOAT32
    return values * size + norm_inputs + _adapter_inputs(model, size) + middles + softmax_sums


def kept_score_bytes(model: ModelShape, rows: int, seq: int) -> int:
    """Bytes of attention scores that one layer keeps: none with fused attention, two copies under a softcap."""
    return 2 * rows * model.heads * seq * seq * FLOAT32 if model.family.keeps_scores else 0


def freed_pieces(model: ModelShape) -> list[tuple[float, int]]:
    """Tensors that one layer's forward allocates and frees again, as (how many, values for one token)."""
    hidden, inner = model.hidden, model.inner * model.experts_per_token
    # per adapted linear: its own output, the adapter's, and the adapter's scaled; their sum goes on
    pieces: list[tuple[float, int]] = [(3, outputs) for _, outputs in model.adapted]
    # transposes around attention and the sums with the residual stream
    pieces.append((3, hidden))
    if model.family.rms:
        pieces.append((2 * model.family.norms, hidden))
    if model.family.rotary:
        # halves turned, joined, multiplied with sine and cosine, added
        pieces += [(4.5, model.attention_width), (4.5, model.kv_width)]
    if model.experts:
        pieces += [(5, inner), (2 * model.experts_per_token, hidden)]
    pieces.append((model.activation.freed, inner))
    return pieces


def _mlp_kept(model: ModelShape) -> int:
    """Values per inner unit kept between the MLP's linears, the last linear's input apart."""
    if not model.family.gated:
        return model.activation.kept
    return model.activation.kept + 2


def _adapter_inputs(model: ModelShape, size: int) -> int:
    """Bytes of the adapters' inputs that nothing else keeps anyway."""
    if size < FLOAT32:
        return FLOAT32 * sum(inputs for inputs, _ in model.adapted)
    # attention's projections share one input and the MLP's first linears another (the same one, where a single
    # norm feeds both); the output projection's input is the attention's output, which is kept already
    inputs = model.hidden if model.family.norms == 1 or model.experts else 2 * model.hidden
    return FLOAT32 * (inputs + (0 if model.experts else model.inner))
