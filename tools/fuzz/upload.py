"""Target: adapter files that edges upload."""

from __future__ import annotations

import torch
from safetensors.torch import save

from hub.worker import parse_upload
from messaging.errors import ProtocolError

_ADAPTER = {"layers.1.q.lora_A.weight": torch.zeros(2, 8), "layers.1.q.lora_B.weight": torch.zeros(8, 2)}


def run(data: bytes) -> None:
    """An edge's adapter file; what is taken holds our tensors and nothing else."""
    try:
        tensors = parse_upload(data, _ADAPTER)
    except ProtocolError:
        return
    for name, value in tensors.items():
        assert value.shape == _ADAPTER[name].shape
        assert bool(torch.isfinite(value).all())


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    one = dict([next(iter(_ADAPTER.items()))])
    return [save(_ADAPTER), save(one), save({}), save({"x": torch.zeros(0, 4)}), save(one, metadata={"format": "pt"})]
