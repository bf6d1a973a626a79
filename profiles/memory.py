"""The peak memory of an edge process, predicted part by part.

What is counted is what the process needs beyond its imports. The parts add up because they are all there at one
moment: when the gradient of the loss is formed, with the graphs of A and C still held.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from profiles.activations import FLOAT32, freed_pieces, kept_bytes, kept_score_bytes
from profiles.model import ModelShape
from profiles.workload import Workload

# The constants for the CPU were fitted to the calibration models of tools/bench_memory.py (random Llama, GPT-2,
# OPT and GPT-NeoX with hidden sizes from 256 to 768), on x86-64 Linux with glibc 2.36, torch 2.13 and one thread.
# They took no part in the benchmark's own table. The fit is older than edge/allocator.py and edge/loss.py. Those for
# CUDA are assumptions; no benchmark has tested them.

#: Code and tables that libraries load on first use, and Python's own objects.
RUNTIME_BYTES = {"cpu": 22 * 2**20, "cuda": 64 * 2**20, "mps": 64 * 2**20}

#: Share of the memory freed during a forward pass that glibc can't use again before the pass ends: torch asks for
#: aligned memory, and a hole of the same size is a few bytes too small for that. Other allocators pool by size.
HOLES = {"cpu": 0.43, "cuda": 0.05, "mps": 0.05}

#: The same for the loss, in copies of the float32 logits.
LOSS_HOLES = {"cpu": 1.8, "cuda": 0.0, "mps": 0.0}

#: Bytes of the freed values, by the bytes of a weight, as shares that add up to one. Over 16-bit weights half of the
#: tensors are 16-bit and half the adapters' float32, and the two sizes fill each other's holes.
FREED_BYTES = {4: {4: 1.0}, 2: {2: 0.5, 4: 0.5}}

#: Above this size glibc takes memory from the system and gives it back at once, so there are no holes
#: (edge/allocator.py: APART_BYTES; a process that does not ask for this has 32 MiB, DEFAULT_MMAP_THRESHOLD_MAX of
#: malloc.c on 64-bit machines).
MMAP_BYTES = 4 * 2**20
UNASKED_MMAP_BYTES = 32 * 2**20

#: The most logits that the edge makes at once in training, and the values of a quantized weight that are in full at
#: once (edge/loss.py: PIECE, blocks/quantize.py: SLAB and GPU_SLAB; a test holds them equal).
PIECE = 1 << 22
SLAB = {"cpu": 1 << 18, "cuda": 1 << 22, "mps": 1 << 22}
#: Bytes that making one of those values takes, all temporaries together.
SLAB_BYTES = 20

#: Copies of the adapters in training: weights, gradients and AdamW's two moments; on CUDA also the temporary
#: of AdamW's multi-tensor form.
ADAPTER_COPIES = {"cpu": 4, "cuda": 5, "mps": 4}


@dataclass(frozen=True)
class MemoryPrediction:
    """Predicted peak in bytes, by what needs it. `holes` is memory that the allocator can't reuse in time."""

    weights: int
    adapters: int
    activations: int
    logits: int
    cache: int
    wire: int
    holes: int
    runtime: int
    dequantized: int = 0

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Every part by name, for display."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def predict_memory(
    model: ModelShape,
    p: int,
    q: int,
    workload: Workload,
    device: str,
    micro_batches: int = 1,
    under_way: int = 1,
) -> MemoryPrediction:
    """The peak of an edge that hosts the first `p` and last `q` layers on a `device` ("cpu", "cuda", "mps").

    With `micro_batches` the batch goes through in that many parts. One of them is in C at a time; `under_way` of
    them are between their forward and their backward in A.
    Raises PlanError while the workload's dtype is "auto".
    """
    rows = -(-workload.batch // micro_batches)
    tokens = rows * workload.seq
    hosted = p + q
    adapter_bytes = adapter_params(model, p, q, workload.lora_rank) * FLOAT32
    wire = tokens * model.hidden * workload.value_bytes
    return MemoryPrediction(
        weights=weight_bytes(model, p, q, workload),
        adapters=adapter_bytes * (ADAPTER_COPIES[device] if workload.training else 1),
        activations=_activations(model, p * under_way + q, rows, workload),
        logits=_logits(model, rows, workload),
        cache=0 if workload.training else 2 * model.kv_width * hosted * tokens * workload.value_bytes,
        # smashed as sent and kept for a retry, hidden as received and as a tensor
        wire=3 * under_way * wire if workload.training else wire,
        holes=_holes(model, hosted, tokens, workload, device, _piece(model, tokens), MMAP_BYTES),
        runtime=RUNTIME_BYTES[device],
        dequantized=_dequantized(model, tokens, workload, device),
    )


def predict_unsplit(model: ModelShape, workload: Workload, device: str) -> MemoryPrediction:
    """The peak of training the same LoRA adapters on the whole model by peft, the loss taken in the whole."""
    whole = predict_memory(model, model.layers, 0, workload, device)
    tokens = workload.batch * workload.seq
    logits = tokens * model.vocab
    softcap = workload.value_bytes if model.softcapped_logits else 0
    # the logits themselves are held by the model's output, beside the log-softmax and the two gradients of it
    holes = _holes(model, model.layers, tokens, workload, device, tokens, UNASKED_MMAP_BYTES)
    return replace(whole, wire=0, holes=holes, logits=logits * (3 * FLOAT32 + workload.value_bytes + softcap))


def weight_params(model: ModelShape, p: int, q: int) -> int:
    """Parameters of Blocks A and C: embedding, the first p and last q layers, final norm and head."""
    layers = sum(model.layer_params[:p]) + sum(model.layer_params[model.layers - q :])
    return model.embed_params + layers + model.head_params


def weight_bytes(model: ModelShape, p: int, q: int, workload: Workload) -> int:
    """What they take: linear layers in the workload's bits, all else in its dtype."""
    layers = sum(model.layer_linears[:p]) + sum(model.layer_linears[model.layers - q :])
    linears = layers + model.head_linears
    return int(linears * workload.linear_bytes) + (weight_params(model, p, q) - linears) * workload.value_bytes


def adapter_params(model: ModelShape, p: int, q: int, rank: int) -> int:
    """Parameters of the LoRA adapters of Blocks A and C."""
    return (p + q) * rank * model.adapter_values_per_rank


def _activations(model: ModelShape, hosted: int, rows: int, workload: Workload) -> int:
    """What training keeps for backward in all hosted layers; in generation, the widest moment of one layer."""
    tokens = rows * workload.seq
    if not workload.training:
        widest = 4 * model.hidden + 2 * model.attention_width + 3 * model.inner * model.experts_per_token
        return tokens * widest * workload.value_bytes
    layers = hosted * (tokens * kept_bytes(model, workload) + kept_score_bytes(model, rows, workload.seq))
    # the final norm keeps its input and makes the head's
    return layers + tokens * model.hidden * (FLOAT32 + workload.value_bytes)


def _logits(model: ModelShape, rows: int, workload: Workload) -> int:
    """In training log-softmax and the two gradients of it, in float32, of one piece, and the gradient by its states.

    A softcap keeps its hyperbolic tangent as well. Generation makes logits for the last position only.
    """
    if not workload.training:
        return rows * model.vocab * (workload.value_bytes + FLOAT32)
    softcap = workload.value_bytes if model.softcapped_logits else 0
    tokens = rows * workload.seq
    by_states = tokens * model.hidden * workload.value_bytes
    return _piece(model, tokens) * model.vocab * (3 * FLOAT32 + softcap) + by_states


def _piece(model: ModelShape, tokens: int) -> int:
    """Tokens whose logits are there at once."""
    return min(tokens, max(1, PIECE // model.vocab))


def _dequantized(model: ModelShape, tokens: int, workload: Workload, device: str) -> int:
    """Quantized weights: a slab of one in full, and in training the widest gradient, which is summed in float32."""
    if workload.bits is None:
        return 0
    slab = min(SLAB[device], max(inputs * outputs for inputs, outputs in model.adapted))
    widest = max(inputs for inputs, _ in model.adapted)
    return slab * SLAB_BYTES + (tokens * widest * FLOAT32 if workload.training else 0)


def _holes(
    model: ModelShape, hosted: int, tokens: int, workload: Workload, device: str, at_once: int, apart: int
) -> int:
    """Memory lost between tensors that come from the allocator's own pool, as those below `apart` bytes do.

    at_once: tokens whose logits are there at one moment.
    """
    freed = sum(
        share * count * width * tokens * size
        for size, share in FREED_BYTES[workload.value_bytes].items()
        for count, width in freed_pieces(model)
        if width * tokens * size < apart
    )
    if not workload.training:
        # nothing is kept, so each layer finds the holes of the one before it
        return int(HOLES[device] * freed)
    logits = at_once * model.vocab * FLOAT32
    tensors = 1 + model.family.scaled_logits + 2 * model.softcapped_logits
    loss = LOSS_HOLES[device] * tensors * logits if logits < apart else 0
    # backward goes through one layer at a time and leaves the holes of one more
    return int(HOLES[device] * (hosted + 1) * freed + loss)
