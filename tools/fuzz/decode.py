"""Target: messages off the wire, for any socket."""

from __future__ import annotations

import random
import struct

import messaging.messages as m
from messaging.errors import ProtocolError
from messaging.framing import SCHEMAS, decode, encode
from messaging.transport import Buffer
from tools.fuzz import samples

_SOCKETS = (m.TO_HUB, m.TO_EDGE, m.ENROL_TO_HUB, m.ENROL_TO_EDGE, frozenset(SCHEMAS))
#: Frames whose length alone matters are cut from this.
_ZEROS = memoryview(bytes(m.MAX_FRAME_BYTES + 1))
_MOST_FRAMES = 2048


def frames_of(data: bytes) -> list[Buffer]:
    """Bytes as frames: a 16-bit length and the header; then for each frame a 32-bit length, of zeros."""
    if len(data) < 2:
        return []
    (size,) = struct.unpack_from("<H", data)
    frames: list[Buffer] = [data[2 : 2 + size]]
    rest = data[2 + size :]
    for at in range(0, min(len(rest) - 3, 4 * _MOST_FRAMES), 4):
        (length,) = struct.unpack_from("<I", rest, at)
        frames.append(_ZEROS[: length % len(_ZEROS)])
    return frames


def run(data: bytes) -> None:
    """The first byte chooses the socket. What is taken must be what encodes to the same again."""
    if not data:
        return
    try:
        packet = decode(frames_of(data[1:]), _SOCKETS[data[0] % len(_SOCKETS)])
    except ProtocolError:
        return
    again = encode(packet)
    second = decode(again, frozenset(SCHEMAS))
    assert type(second.message) is type(packet.message)
    assert second.envelope == packet.envelope
    assert encode(second) == again


def seeds() -> list[bytes]:
    """Valid inputs to begin with."""
    found = []
    for cls in samples.KINDS.values():
        for seed in range(3):
            header, *chunks = samples.frames(cls, random.Random(seed))
            lengths = b"".join(struct.pack("<I", len(chunk)) for chunk in chunks)
            found.append(b"\x04" + struct.pack("<H", len(header)) + header + lengths)
    return found
