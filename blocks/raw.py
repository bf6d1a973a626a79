"""A tensor's memory as bytes."""

from __future__ import annotations

from typing import Any

import torch


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, sharing its memory; writing to them writes to the tensor."""
    if tensor.numel() == 0:
        return memoryview(bytearray())
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
