"""Huge pages for the hub's tensors."""

from __future__ import annotations

import os


def ask_for_huge_pages() -> None:
    """Have torch ask Linux for huge pages, for tensors from 2 MiB on. Set before torch makes its first tensor.

    The graph of a large joined step comes and goes with every step. In small pages the faults of its memory took up
    to a fifth of the time. An edge does without: its tensors are smaller, and its memory is what counts there.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
