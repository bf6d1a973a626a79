"""Frozen linear layers held in 8 or 4 bits, and made into numbers again a slab at a time as they are used.

torchao does the arithmetic: 8 bits are int8 with a scale for each output, 4 bits are NF4 with double quantization
(QLoRA, arXiv 2305.14314, section 3). Of its 4-bit layouts NF4 is the one that computes on any device. A weight is
kept as slabs of whole rows, each quantized by itself. So no more than one slab is there in full at any moment, in
forward, backward and loading; torchao's own linears keep a whole weight in full until the backward.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Mapping
from contextlib import suppress
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from messaging.errors import InputError

#: Values of one slab, about. A processor loses no time with small ones; a GPU has to be kept busy.
SLAB, GPU_SLAB = 1 << 18, 1 << 22
#: NF4: values with a common scale, and such scales with a common scale of their own.
_BLOCK, _SCALES = 64, 256
_CHOICES = {"8bit": 8, "4bit": 4}


def parse_bits(load_in: str | None) -> int | None:
    """'8bit' -> 8, '4bit' -> 4, None -> None. Raises InputError for anything else, or where torchao is missing."""
    if load_in is None:
        return None
    if load_in not in _CHOICES:
        raise InputError(f"--load-in {load_in}: give {' or '.join(_CHOICES)}, or leave it out for the hub's own dtype")
    bits = _CHOICES[load_in]
    _library(bits)
    return bits


class QuantizedLinear(nn.Linear):
    """A frozen nn.Linear whose weight [out, in] is held in `bits` bits, as buffers that hold some rows each.

    Gradients flow through it to the input, as through the same layer with the dequantized weight.
    """

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None, bits: int) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.bits = bits
        self.register_parameter("bias", bias)
        self._rows = _slab_rows(weight)
        self._starts = list(range(0, self.out_features, self._rows))
        room: _Room | None = None
        for number, start in enumerate(self._starts):
            slab = _quantize(weight[start : start + self._rows], bits)
            room = room or _Room(slab, len(self._starts))
            self.register_buffer(f"slab_{number}", room.take(slab))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight that it computes with, in full. Made at every call."""
        first = self._slab(0)
        out = first.new_empty(self.out_features, self.in_features)
        for number, start in enumerate(self._starts):
            slab = self._slab(number)
            out[start : start + len(slab)] = slab
        return out

    @property
    def nbytes(self) -> int:
        """What the weight takes as it is held."""
        return sum(held_bytes(slab) for slab in self.buffers())

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states [..., in] -> [..., out]."""
        out: torch.Tensor = _Product.apply(states, self)
        return out if self.bias is None else out + self.bias

    def product(self, states: torch.Tensor) -> torch.Tensor:
        """states [..., in] times the weight's transpose -> [..., out]."""
        flat = states.reshape(-1, self.in_features)
        out = flat.new_empty(len(flat), self.out_features)
        for number, start in enumerate(self._starts):
            slab = self._slab(number)
            out[:, start : start + len(slab)] = flat @ slab.t()
        return out.view(*states.shape[:-1], self.out_features)

    def product_back(self, grads: torch.Tensor) -> torch.Tensor:
        """grads [..., out] times the weight -> [..., in]; the slabs' shares are summed in float32."""
        flat = grads.reshape(-1, self.out_features)
        total = torch.zeros(len(flat), self.in_features, device=flat.device)
        for number, start in enumerate(self._starts):
            slab = self._slab(number)
            total += flat[:, start : start + len(slab)] @ slab
        return total.to(grads.dtype).view(*grads.shape[:-1], self.in_features)

    def _slab(self, number: int) -> torch.Tensor:
        """Rows of the weight, in full."""
        held: Any = self.get_buffer(f"slab_{number}")
        if self.bits == 8:
            rows: torch.Tensor = held.dequantize()
            return rows
        start = self._starts[number]
        count = min(self._rows, self.out_features - start)
        flat: torch.Tensor = held.get_original_weight()
        return flat[: count * self.in_features].view(count, self.in_features)

    def extra_repr(self) -> str:
        """As nn.Linear says it, and the bits."""
        return f"{super().extra_repr()}, bits={self.bits}"


class _Product(torch.autograd.Function):
    """The product with a frozen weight: nothing is kept for the backward but where the weight is."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, layer: QuantizedLinear) -> torch.Tensor:
        ctx.layer = layer
        return layer.product(states)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.layer.product_back(grads[0]), None


def quantizable(model: PreTrainedModel) -> dict[str, int]:
    """The weights that can be held in fewer bits, by parameter name, and how many values each has.

    Those of linear layers, the head's among them unless it is the embedding.
    """
    tied = model.all_tied_weights_keys
    left = {*tied, *tied.values()}
    return {
        f"{path}.weight": module.in_features * module.out_features
        for path, module in model.named_modules()
        if type(module) is nn.Linear and f"{path}.weight" not in left
    }


class LoadQuantizer:
    """What transformers' loader asks to have weights quantized, each as soon as it is read (its `HfQuantizer`)."""

    pre_quantized = False

    def __init__(self, model: PreTrainedModel, bits: int) -> None:
        self._bits = bits
        self._names = quantizable(model).keys()
        if not self._names:
            raise InputError(
                f"--load-in {bits}bit: {type(model).__name__} keeps its weights in no plain linear layers; leave it out"
            )

    def param_needs_quantization(self, model: PreTrainedModel, name: str, **_: object) -> bool:
        """Whether this parameter is one of those."""
        return name in self._names

    def get_quantize_ops(self) -> LoadQuantizer:
        """What has `convert`."""
        return self

    def convert(
        self, tensors: Mapping[str, Any], model: PreTrainedModel, full_layer_name: str, missing_keys: set[str], **_: Any
    ) -> dict[str, torch.Tensor]:
        """Put the layer with this weight in the place of the empty one; nothing is left for the loader to set."""
        (value,) = tensors.values()
        weight = value[0] if isinstance(value, list) else value
        path = full_layer_name.removesuffix(".weight")
        old = model.get_submodule(path)
        if not isinstance(old, nn.Linear) or weight.shape != (old.out_features, old.in_features):
            raise ValueError(f"{full_layer_name} has the shape {tuple(weight.shape)}")
        # of the weight before this one
        release_freed_memory()
        new = QuantizedLinear(weight, old.bias, self._bits)
        new._is_hf_initialized = True  # type: ignore[assignment]
        for hook in old._forward_pre_hooks.values():
            new.register_forward_pre_hook(hook)
        parts = path.rpartition(".")
        setattr(model.get_submodule(parts[0]), parts[2], new)
        missing_keys.discard(full_layer_name)
        return {}


def release_freed_memory() -> None:
    """Give what was in full for a moment back to the system: glibc keeps it, in holes between what stays."""
    with suppress(OSError):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def held_bytes(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in memory, with all of its parts where it is a quantized one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    return sum(part.nbytes for part in _parts(tensor).values())


def _slab_rows(weight: torch.Tensor) -> int:
    """Rows of a slab of this weight: such that NF4's blocks come out even, if there is room for so many."""
    width = weight.shape[1]
    even = _BLOCK * _SCALES // math.gcd(width, _BLOCK * _SCALES)
    rows = max(1, (SLAB if weight.device.type == "cpu" else GPU_SLAB) // width)
    return rows - rows % even or rows


def _quantize(rows: torch.Tensor, bits: int) -> torch.Tensor:
    library: Any = _library(bits)
    held: torch.Tensor
    if bits == 8:
        held = library.Int8Tensor.from_hp(rows, library.PerRow())
        return held
    flat = rows.flatten()
    missing = -len(flat) % (_BLOCK * _SCALES)
    if missing:
        # its own values again: zeros would shift the scales that the last blocks share
        flat = torch.cat([flat, flat.repeat(-(-missing // len(flat)))[:missing]])
    held = library.NF4Tensor.from_tensor(flat, _BLOCK, _SCALES)
    return held


class _Room:
    """Memory in one piece for a number of quantized tensors like the first one.

    Small tensors that stay, made between large ones that go, would leave malloc with holes larger than the weight.
    """

    def __init__(self, first: torch.Tensor, count: int) -> None:
        size = sum(_aligned(part) for part in _parts(first).values())
        self._free = torch.empty(count * size, dtype=torch.int8, device=first.device)

    def take(self, tensor: Any) -> torch.Tensor:
        """The same quantized tensor, all of it in here."""
        parts = {}
        for name, part in _parts(tensor).items():
            parts[name] = self._free[: part.nbytes].view(part.dtype).view(part.shape).copy_(part)
            self._free = self._free[_aligned(part) :]
        context = tensor.__tensor_flatten__()[1]
        moved: torch.Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())
        return moved


def _parts(tensor: Any) -> dict[str, torch.Tensor]:
    """The plain tensors that a quantized one consists of."""
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _aligned(part: torch.Tensor) -> int:
    """Its bytes, rounded up to where the next may begin."""
    return -(-part.nbytes // 64) * 64


def _library(bits: int) -> ModuleType:
    """torchao's part for so many bits. Raises InputError where it is missing or is too old or new."""
    try:
        module = importlib.import_module("torchao.quantization")
        for name in ("Int8Tensor", "PerRow") if bits == 8 else ("NF4Tensor",):
            getattr(module, name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--load-in {bits}bit needs torchao 0.18 or newer, which cannot be used here ({error}): "
            "pip install 'fedsea[quantized]', or leave --load-in out"
        ) from error
    return module
