"""A checkpoint that is in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from blocks.weights import TensorInfo


class StateDictSource:
    """A `WeightSource` of tensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Iterable[str]:
        """See WeightSource."""
        return self._tensors.keys()

    def info(self, name: str) -> TensorInfo:
        """See WeightSource."""
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.dtype, tuple(tensor.shape))

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """See WeightSource."""
        tensor = self._tensors[name].detach()
        return tensor.to(dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
