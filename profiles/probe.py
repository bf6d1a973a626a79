"""The probe: what this machine has free and how fast it is, measured in about a second.

Speeds are those a program gets now, at torch's present thread count and beside whatever else is running, as the
median of repeated measurements. torch is imported inside the functions: the planner works without it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil

from profiles.cgroup import cgroup_memory
from profiles.errors import ProfileError
from profiles.machine import DEVICES, Machine

if TYPE_CHECKING:
    import torch

#: Seconds for each of the measurements (arithmetic in each dtype, memory bandwidth).
BUDGET_S = 0.35

#: Side of the square matrices that are multiplied: large enough to reach the speed of a model's linears, small
#: enough for a slow processor to manage several within the budget.
MATRIX_SIDE = {"cpu": 512, "cuda": 4096, "mps": 2048}

#: Bytes of the tensor that is copied: more than the caches of a laptop hold, little beside a model.
COPY_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20, "mps": 256 * 2**20}


def probe_machine(device: str = "cpu") -> Machine:
    """Measure this machine's `device` ("cpu", "cuda" or "mps"), in less than 1.5 s once torch is imported.

    Raises ProfileError when there is no such device here.
    """
    import torch

    if device not in DEVICES:
        raise ProfileError(f"unknown device '{device}': use one of {', '.join(DEVICES)}")
    total, free = _memory(device)
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device != "cpu")
    flops = {str(dtype).removeprefix("torch."): _matmul_flops(device, dtype) for dtype in dtypes}
    measured = "measured by the probe" + (f" with {torch.get_num_threads()} threads" if device == "cpu" else "")
    return Machine(
        name="this machine",
        device=device,
        memory_bytes=total,
        free_memory_bytes=free,
        bandwidth_bytes_per_s=_copy_bandwidth(device),
        flops=flops,
        description=torch.cuda.get_device_name() if device == "cuda" else device,
        sources=dict.fromkeys(["free_memory_bytes", "memory_bandwidth_bytes_per_s", "flops"], measured),
    )


def _memory(device: str) -> tuple[int, int]:
    """Total and free memory in bytes: of the device where it has its own, else of this machine or its container."""
    import torch

    if device == "cuda":
        if not torch.cuda.is_available():
            raise ProfileError("no CUDA device here: use the CPU, or install a torch that was built for CUDA")
        free, total = torch.cuda.mem_get_info()
        return total, free
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ProfileError("no Apple GPU here: use the CPU")
        # Metal refuses to hold much more than this, however much is free
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    limit = cgroup_memory()
    if limit is not None:
        total, free = min(total, limit[0]), min(free, limit[1])
    return total, free


def _matmul_flops(device: str, dtype: torch.dtype) -> float:
    """Operations per second of a square matrix product: 2 n^3 over the median time."""
    import torch

    side = MATRIX_SIDE[device]
    left, right = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _median_seconds(lambda: torch.mm(left, right, out=out), device)


def _copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, what is read and what is written counted together."""
    import torch

    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPY_BYTES[device] / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(work: Callable[[], object], device: str) -> float:
    """Median time of `work`, repeated within the budget but at least once after one run that warms up."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        elif device == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    end = time.perf_counter() + BUDGET_S
    timed()
    seconds = [timed()]
    while time.perf_counter() < end:
        seconds.append(timed())
    return statistics.median(seconds)
