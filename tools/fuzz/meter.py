"""How long a call takes and how much memory it takes on top, at worst. Linux only."""

from __future__ import annotations

import gc
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

#: Writing this to /proc/self/clear_refs sets the process's peak of memory back to what it holds now.
_RESET_PEAK = b"5"


@dataclass
class Meter:
    """The worst of many calls.

    worst_ms: milliseconds of this thread's CPU time, so that a busy machine does not count; worst_mb: megabytes that
    the process held more at the peak of a call than before it.
    """

    worst_ms: float = 0.0
    worst_mb: float = 0.0
    calls: int = 0

    def measure(self, call: Callable[[], object]) -> None:
        """Make the call and note what it took, also when it raises."""
        with open("/proc/self/clear_refs", "wb", buffering=0) as refs:
            refs.write(_RESET_PEAK)
        before = _memory("VmRSS")
        # Garbage of what was before is not this call's.
        gc.disable()
        begun = time.thread_time()
        try:
            call()
        finally:
            self.worst_ms = max(self.worst_ms, 1000 * (time.thread_time() - begun))
            gc.enable()
            self.worst_mb = max(self.worst_mb, (_memory("VmHWM") - before) / 1e6)
            self.calls += 1


def resident_mb(process: int) -> float:
    """Megabytes that a process holds now."""
    return _memory("VmRSS", process) / 1e6


def _memory(name: str, process: int | None = None) -> int:
    """A figure of /proc/PID/status, in bytes."""
    descriptor = os.open(f"/proc/{process or 'self'}/status", os.O_RDONLY)
    try:
        text = os.read(descriptor, 8192).decode()
    finally:
        os.close(descriptor)
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None, f"this kernel does not tell {name}"
    return 1024 * int(found[1])
