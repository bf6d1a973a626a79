"""Tensors to bytes and back, checked."""

from __future__ import annotations

import math

import torch

from blocks.raw import raw_bytes
from messaging.errors import NotFinite, ProtocolError
from messaging.messages import DTYPES, MAX_FRAME_BYTES, Tensor

_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8, "i32": torch.int32}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
assert set(_TORCH) == set(DTYPES)


def to_wire(tensor: torch.Tensor) -> Tensor:
    """A tensor's bytes, little-endian in C order; the buffers share its memory (copied only from a GPU)."""
    flat = tensor.detach().to("cpu").contiguous()
    data = raw_bytes(flat)
    chunks = tuple(data[at : at + MAX_FRAME_BYTES] for at in range(0, len(data), MAX_FRAME_BYTES))
    return Tensor(_NAMES[flat.dtype], tuple(flat.shape), chunks)


def from_wire(tensor: Tensor, *, dtype: torch.dtype, shape: tuple[int | None, ...]) -> torch.Tensor:
    """The tensor on the CPU, with memory of its own.

    Raises ProtocolError unless dtype and shape are as expected (None: any size), NotFinite for NaN or Inf.
    """
    if tensor.dtype not in _TORCH or _TORCH[tensor.dtype] != dtype:
        raise ProtocolError(f"expected a tensor of {_NAMES[dtype]}, got {tensor.dtype}")
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ProtocolError(f"expected a tensor of shape {shape}, got {tensor.shape}")
    if sum(len(chunk) for chunk in tensor.chunks) != tensor.nbytes:
        raise ProtocolError("a tensor's bytes do not match its shape")
    out = torch.empty(math.prod(tensor.shape), dtype=dtype)
    raw = raw_bytes(out)
    at = 0
    for chunk in tensor.chunks:
        raw[at : at + len(chunk)] = chunk
        at += len(chunk)
    if dtype.is_floating_point and not math.isfinite(float(out.sum(dtype=torch.float32))) and not _finite(out):
        raise NotFinite("a tensor from the wire holds NaN or infinite values")
    return out.view(tensor.shape)


def _finite(tensor: torch.Tensor) -> bool:
    # A finite sum proves that all is finite at a tenth of isfinite's cost; only an infinite one needs the full look.
    return bool(torch.isfinite(tensor).all())
