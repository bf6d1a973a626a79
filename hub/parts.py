"""A part of a safetensors file, served as a safetensors file of its own without being written anywhere."""

from __future__ import annotations

import hashlib
import json
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

_PIECE = 1 << 20


class Whole(Protocol):
    """The file that a part is of."""

    @property
    def sha256(self) -> str:
        """Its hash."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only at the end."""


class Part:
    """The tensors of `whole` whose names `belongs` takes. The same whole gives the same bytes, always.

    Reads the header of `whole` when it is made, and the data when they are asked for.
    """

    def __init__(self, whole: Whole, belongs: Callable[[str], bool]) -> None:
        self.whole_sha256 = whole.sha256
        self._whole = whole
        (length,) = struct.unpack("<Q", whole.read(0, 8))
        entries = json.loads(whole.read(8, length))
        start, at = 8 + length, 0
        header: dict[str, object] = {}
        #: where each run of bytes begins here and in `whole`, and its length
        self._runs: list[tuple[int, int, int]] = []
        chosen = [name for name in entries if name != "__metadata__" and belongs(name)]
        for name in sorted(chosen, key=lambda name: entries[name]["data_offsets"]):
            begin, end = entries[name]["data_offsets"]
            header[name] = {**entries[name], "data_offsets": [at, at + end - begin]}
            self._runs.append((at, start + begin, end - begin))
            at += end - begin
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = struct.pack("<Q", len(text)) + text
        self.total = len(self._head) + at
        self._sha256: str | None = None
        self._hashing = threading.Lock()

    @property
    def sha256(self) -> str:
        """The hash of all of it; the first call reads all of it."""
        with self._hashing:
            if self._sha256 is None:
                digest = hashlib.sha256()
                for at in range(0, self.total, _PIECE):
                    digest.update(self.read(at, _PIECE))
                self._sha256 = digest.hexdigest()
            return self._sha256

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on, fewer only at the end."""
        end = min(offset + length, self.total)
        return self._head[offset:end] + b"".join(self._between(offset - len(self._head), end - len(self._head)))

    def _between(self, first: int, last: int) -> Iterator[bytes]:
        """The data from `first` on, before `last`; both counted from the end of the header."""
        for here, there, size in self._runs:
            begin, end = max(first, here), min(last, here + size)
            if begin < end:
                yield self._whole.read(there + begin - here, end - begin)
