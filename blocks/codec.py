"""Tensors to bytes and back, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from blocks import quantised
from blocks.device import host_empty, to_device, to_host
from blocks.raw import raw_bytes
from messaging.errors import InputError, NotFinite, ProtocolError
from messaging.messages import DTYPES, MAX_FRAME_BYTES, Tensor

_TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8, "i32": torch.int32}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}
_CPU = torch.device("cpu")
assert {*_TORCH, "q8"} == set(DTYPES)
#: what users call the dtypes that states and gradients may have on the wire
WIRES = {"fp32": "f32", "bf16": "bf16", "fp16": "f16", "int8": "q8"}


def wire_dtype(wire: str | None) -> str | None:
    """The wire's name of a dtype that a user asked for; None, for the tensor's own, stays. InputError for no such."""
    if wire is not None and wire not in WIRES:
        raise InputError(f"--wire must be one of {', '.join(WIRES)}, not {wire}")
    return None if wire is None else WIRES[wire]


# -- to the wire -----------------------------------------------------------------------------------------


def to_wire(tensor: torch.Tensor, dtype: str | None = None) -> Tensor:
    """A tensor's bytes in this wire dtype (default: its own), little-endian in C order.

    The buffers share the tensor's memory where nothing is converted and it is on the CPU. InputError where float16
    cannot hold the values.
    """
    dtype = dtype or _NAMES[tensor.dtype]
    return Tensor(dtype, tuple(tensor.shape), _chunks(_converted(tensor, dtype)))


@dataclass(frozen=True, eq=False)
class Rows:
    """What `to_wire` sends, to keep, cut along any axis but the last, and send again.

    data: uint8 [..., bytes of a row], of rows of `width` values in the wire dtype `dtype`.
    """

    data: torch.Tensor
    dtype: str
    width: int

    def to_wire(self) -> Tensor:
        """These rows on the wire."""
        return Tensor(self.dtype, (*self.data.shape[:-1], self.width), _chunks(self.data.contiguous()))


def to_rows(tensor: torch.Tensor, dtype: str | None = None) -> Rows:
    """A tensor [..., width] in this wire dtype (default: its own). InputError as `to_wire`."""
    dtype = dtype or _NAMES[tensor.dtype]
    return Rows(_converted(tensor, dtype).view(torch.uint8), dtype, tensor.shape[-1])


def _converted(tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """On the CPU, contiguous, in the torch dtype of the wire's one; uint8 for q8."""
    tensor = tensor.detach()
    if dtype == "q8":
        return to_host(quantised.pack(tensor))
    out = to_host(tensor.to(_TORCH[dtype])).contiguous()
    if dtype == "f16" and tensor.dtype != torch.float16 and not _finite(out) and _finite(tensor):
        largest = float(tensor.abs().max())
        raise InputError(f"fp16 on the wire cannot hold values as large as {largest:.3g}: use --wire bf16 or int8")
    return out


def _chunks(flat: torch.Tensor) -> tuple[memoryview, ...]:
    data = raw_bytes(flat)
    return tuple(data[at : at + MAX_FRAME_BYTES] for at in range(0, len(data), MAX_FRAME_BYTES))


# -- from the wire ---------------------------------------------------------------------------------------


def from_wire(
    tensor: Tensor, *, dtype: torch.dtype, shape: tuple[int | None, ...], device: torch.device = _CPU
) -> torch.Tensor:
    """The tensor on `device`, with memory of its own. A floating `dtype` is converted to, whichever the wire had.

    Raises ProtocolError unless dtype and shape are as expected (None: any size), NotFinite for NaN or Inf.
    """
    floats = dtype.is_floating_point and tensor.dtype in WIRES.values()
    if not floats and _TORCH.get(tensor.dtype) != dtype:
        raise ProtocolError(f"expected a tensor of {_NAMES[dtype]}, got {tensor.dtype}")
    fits = len(tensor.shape) == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ProtocolError(f"expected a tensor of shape {shape}, got {tensor.shape}")
    if sum(len(chunk) for chunk in tensor.chunks) != tensor.nbytes:
        raise ProtocolError("a tensor's bytes do not match its shape")
    if tensor.dtype == "q8":
        return to_device(_unpacked(tensor, dtype), device)
    out = host_empty(math.prod(tensor.shape), _TORCH[tensor.dtype], device)
    _fill(out, tensor)
    out = out.to(dtype)
    if dtype.is_floating_point and not _finite(out):
        raise NotFinite("a tensor from the wire holds NaN or infinite values")
    return to_device(out, device).view(tensor.shape)


def _unpacked(tensor: Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.shape:
        raise ProtocolError("a q8 tensor has at least one axis")
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    _fill(data, tensor)
    rows = math.prod(tensor.shape[:-1])
    packed = data.view(rows, tensor.nbytes // rows if rows else 0)
    return quantised.unpack(packed, tensor.shape[-1], dtype).view(tensor.shape)


def _fill(out: torch.Tensor, tensor: Tensor) -> None:
    raw, at = raw_bytes(out), 0
    for chunk in tensor.chunks:
        raw[at : at + len(chunk)] = chunk
        at += len(chunk)


def _finite(tensor: torch.Tensor) -> bool:
    # A finite sum proves that all is finite at a tenth of isfinite's cost; only an infinite one needs the full look.
    return math.isfinite(float(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
