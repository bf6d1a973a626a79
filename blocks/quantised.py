"""q8, numbers as int8 with scales: one byte for each, and two for every 128 of them or more.

Each row of the last axis is quantised by itself, symmetrically: a group of values (`q8_group`) shares one scale, a
little over its largest magnitude / 127, rounded to bfloat16. So one outlier coarsens its own group and nothing else,
and a row's bytes depend on nothing but the row: what is sent again is sent as the same bytes. The product of scale and
int8 is exact in float32.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from messaging.errors import NotFinite, ProtocolError
from messaging.messages import q8_group

_MOST = 127
#: Above 1 / 127 by more than bfloat16 may round down, so that no quotient is over 127.
_SCALE = (1 + 2**-8 + 2**-15) / _MOST
#: Values quantised at a time: what is made on the way stays in the processor's cache.
_BLOCK = 1 << 17
#: The smallest scale: that of zeros. Its reciprocal is finite.
_LEAST = torch.finfo(torch.bfloat16).tiny


def pack(values: torch.Tensor) -> torch.Tensor:
    """values [..., width] of any float dtype, without a graph -> uint8 [..., bytes of a row], on the same device.

    A group that holds NaN or infinite values gets a scale that is not finite, which `unpack` refuses.
    """
    width = values.shape[-1]
    if not values.numel():
        return torch.empty(values.shape, dtype=torch.uint8)
    groups, _ = _groups(width)
    rows = values.reshape(-1, width)
    out = torch.empty(len(rows), 2 * groups + width, dtype=torch.uint8, device=values.device)
    block = max(1, _BLOCK // width)
    for at in range(0, len(rows), block):
        _pack_rows(rows[at : at + block], out[at : at + block])
    return out.view(*values.shape[:-1], -1)


def _pack_rows(values: torch.Tensor, out: torch.Tensor) -> None:
    """values [rows, width] into out, uint8 [rows, bytes of a row]."""
    rows, width = values.shape
    groups, group = _groups(width)
    padded = functional.pad(values, (0, groups * group - width)) if groups * group > width else values
    grouped = padded.float().view(rows, groups, group)
    steps = grouped.abs()
    scales = (steps.amax(-1) * _SCALE).to(torch.bfloat16).clamp_(min=_LEAST)
    torch.mul(grouped, scales.float().reciprocal_()[..., None], out=steps)
    out[:, : 2 * groups] = scales.view(torch.uint8)
    out[:, 2 * groups :].view(torch.int8).copy_(steps.round_().view(rows, -1)[:, :width])


def unpack(data: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [rows, bytes of a row] -> values [rows, width].

    NotFinite where a scale or a value is not; ProtocolError where a scale is not above zero.
    """
    if not data.numel():
        return torch.empty(len(data), width, dtype=dtype)
    groups, group = _groups(width)
    stored = torch.empty(len(data), groups, dtype=torch.bfloat16)
    stored.view(torch.uint8).copy_(data[:, : 2 * groups])
    scales = stored.float()
    least, most = (float(bound) for bound in scales.aminmax())
    if not math.isfinite(least) or not math.isfinite(most):
        raise NotFinite("a tensor from the wire holds NaN or infinite values")
    if least <= 0:
        raise ProtocolError("the scales of a q8 tensor must be above zero")
    values = torch.empty(len(data), width)
    values.copy_(data[:, 2 * groups :].view(torch.int8))
    whole = width // group
    values[:, : whole * group].unflatten(1, (whole, group)).mul_(scales[:, :whole, None])
    values[:, whole * group :].mul_(scales[:, whole:])
    values = values.to(dtype)
    if most * (_MOST + 1) > torch.finfo(dtype).max and not bool(torch.isfinite(values).all()):
        raise NotFinite("a tensor from the wire holds values beyond what its dtype can hold")
    return values


def _groups(width: int) -> tuple[int, int]:
    """How many groups a row has, and the values in each; the last one may have fewer."""
    group = min(q8_group(width), width)
    return -(-width // group), group
