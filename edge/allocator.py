"""glibc's malloc, as training needs it: large tensors in memory of their own, which goes back when they are freed.

By itself malloc learns from the first large tensor that is freed to keep those up to 32 MiB in its heap. Tensors that
training keeps for the backward then lie between those it frees, and the holes cost an edge a fifth of its memory.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

#: Tensors from this size on are apart. Smaller ones come and go too often for that.
APART_BYTES = 4 << 20
_M_MMAP_THRESHOLD = -3  # malloc.h


def keep_large_tensors_apart() -> None:
    """From now on, in this process. Where the C library is another one, nothing happens."""
    with suppress(OSError):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, APART_BYTES)
