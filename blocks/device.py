"""The device that tensors are computed on, by name."""

from __future__ import annotations

import torch

from messaging.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto`: the GPU where there is one, else the CPU. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--device {name} cannot be used here ({reason}): choose auto, cpu, cuda, cuda:1, ..."
        ) from error
    return device
