"""The devices that tensors are computed on: by name, which layers stand where, how values get there and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch

from messaging.errors import InputError

#: How much of a device's memory weights may take.
_FULL = 0.9


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


def pick_devices(names: str) -> tuple[torch.device, ...]:
    """One device, or several with commas between them, over which layers are spread; else as `pick_device`."""
    if "," not in names:
        return (pick_device(names),)
    chosen = [pick_device(name.strip()) for name in names.split(",")]
    found = tuple(_numbered(device) for device in chosen)
    twice = [device for device, count in Counter(found).items() if count > 1 and device.type != "cpu"]
    if twice:
        raise InputError(f"--device {names} names {twice[0]} twice: name each GPU once")
    return found


def _numbered(device: torch.device) -> torch.device:
    """`cuda` by its number."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


def spread(sizes: Sequence[int], devices: Sequence[torch.device], free: Mapping[torch.device, int]) -> list[int]:
    """Each layer's device, by its number; every device gets consecutive layers.

    sizes: bytes of each layer, in order; free: bytes that a device has, where that is known. If it is known of all,
    each gets layers in proportion to it, else equal parts. Raises InputError where a device would be too full: a
    tenth has to stay for what is computed.
    """
    room = [free.get(device) for device in devices]
    weights = [known or 0 for known in room] if all(room) else [1] * len(devices)
    ends = [end / sum(weights) for end in accumulate(weights)]
    middles = [(end - size / 2) / sum(sizes) for end, size in zip(accumulate(sizes), sizes, strict=True)]
    numbers = [next(number for number, end in enumerate(ends) if middle < end) for middle in middles]
    for number, known in enumerate(room):
        need = sum(size for size, home in zip(sizes, numbers, strict=True) if home == number)
        if known is not None and need > _FULL * known:
            raise InputError(
                f"{need >> 20} MiB of the hub's blocks would be on {devices[number]}, which has {known >> 20} MiB "
                "free: name more devices, as in --device cuda:0,cuda:1, or a smaller --dtype"
            )
    return numbers


def free_on(devices: Sequence[torch.device]) -> dict[torch.device, int]:
    """Bytes that are free now, of GPUs alone: a CPU's memory is shared with all that runs there, and may swap."""
    return {device: torch.cuda.mem_get_info(device)[0] for device in devices if device.type == "cuda"}


def host_empty(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor on the CPU, for values that go to `device`; page-locked, from torch's pool, if that is a GPU."""
    return torch.empty(count, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU tensor's values on `device`.

    To a GPU they go through page-locked memory, while the GPU and this thread compute on. Torch's pool of such memory
    lends a block again only when the copy out of it is done, so the tensor may be dropped at once. It must not be
    written to until then.
    """
    if device.type != "cuda":
        return tensor.to(device)
    # What is expanded cannot be copied into its own strides.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values on the CPU, there when this returns; a GPU writes them into page-locked memory."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
