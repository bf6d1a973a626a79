"""Target: the integers that describe the rows of a batch."""

from __future__ import annotations

import struct

from blocks.layout import Layout
from messaging.errors import ProtocolError


def run(data: bytes) -> None:
    """Three sizes as the hub lets them through, then the integers; a layout that is taken must be usable."""
    if len(data) < 6:
        return
    rows, past, width = struct.unpack_from("<HHH", data)
    ints = struct.unpack_from(f"<{min((len(data) - 6) // 8, 4096)}q", data, 6)
    rows, past, width = rows % 65, past % 513, width % 129
    try:
        layout = Layout.from_ints(ints, rows, past, width, 4096)
    except ProtocolError:
        return
    positions = layout.positions()
    assert positions.shape == (rows, width)
    assert 0 <= int(positions.min()) <= int(positions.max()) < 4096
    assert layout.real().shape == (rows, width)
    assert Layout.from_ints(layout.to_ints(), rows, past, width).to_ints() == layout.to_ints()


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    shapes = [(1, 0, 4, ()), (2, 3, 1, (1, 1, 2, 0)), (1, 2, 3, (2, 1, 1, 1, 4)), (1, 0, 5, (3, 0, 4, 0, 2, 0, 3))]
    return [struct.pack(f"<HHH{len(ints)}q", rows, past, width, *ints) for rows, past, width, ints in shapes]
