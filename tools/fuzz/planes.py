"""Target: packed pieces of weights, as an edge fetches them."""

from __future__ import annotations

import struct

from blocks.planes import pack, unpack
from messaging.errors import ProtocolError


def run(data: bytes) -> None:
    """The size that was asked for, the element's bytes, then what came packed in two chunks."""
    if len(data) < 4:
        return
    size, element, cut = struct.unpack_from("<HBB", data)
    packed = data[4:]
    try:
        unpacked = unpack((packed[:cut], packed[cut:]), 1 + element % 8, size)
    except ProtocolError:
        return
    assert len(unpacked) == size


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    data = bytes(range(8)) * 64
    packed = [(element, pack(data, element)) for element in (1, 2, 4)]
    return [struct.pack("<HBB", len(data), element - 1, 9) + (code or b"") for element, code in packed]
