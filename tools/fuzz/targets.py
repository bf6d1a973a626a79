"""What is fuzzed: functions of bytes that must end well, or in the one named error of their kind.

Anything else that they raise is a fault. Each has seeds: valid inputs that the fuzzer begins with.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import save

import messaging.messages as m
from blocks.layout import Layout
from blocks.planes import pack, unpack
from hub.worker import parse_upload
from messaging.errors import InputError, ProtocolError
from messaging.framing import SCHEMAS, decode, encode
from messaging.joining import HubAddress, JoinString
from messaging.transport import Buffer, Channel
from tools.fuzz import samples

_SOCKETS = (m.TO_HUB, m.TO_EDGE, m.ENROL_TO_HUB, m.ENROL_TO_EDGE, frozenset(SCHEMAS))
#: Frames whose length alone matters are cut from this.
_ZEROS = memoryview(bytes(m.MAX_FRAME_BYTES + 1))
_MOST_FRAMES = 2048
_ADAPTER = {"layers.1.q.lora_A.weight": torch.zeros(2, 8), "layers.1.q.lora_B.weight": torch.zeros(8, 2)}


@dataclass(frozen=True)
class Target:
    """A function to fuzz, and inputs that get far in it."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


# --- messages ----------------------------------------------------------------------------------


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


def fuzz_decode(data: bytes) -> None:
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


def _decode_seeds() -> list[bytes]:
    seeds = []
    for cls in samples.KINDS.values():
        for seed in range(3):
            header, *chunks = samples.frames(cls, random.Random(seed))
            lengths = b"".join(struct.pack("<I", len(chunk)) for chunk in chunks)
            seeds.append(b"\x04" + struct.pack("<H", len(header)) + header + lengths)
    return seeds


# --- layouts -----------------------------------------------------------------------------------


def fuzz_layout(data: bytes) -> None:
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


def _layout_seeds() -> list[bytes]:
    shapes = [(1, 0, 4, ()), (2, 3, 1, (1, 1, 2, 0)), (1, 2, 3, (2, 1, 1, 1, 4)), (1, 0, 5, (3, 0, 4, 0, 2, 0, 3))]
    return [struct.pack(f"<HHH{len(ints)}q", rows, past, width, *ints) for rows, past, width, ints in shapes]


# --- join strings ------------------------------------------------------------------------------


def fuzz_join_string(data: bytes) -> None:
    """Any text, by itself or behind the prefix."""
    text = data.decode("utf-8", "surrogateescape")
    for given in (text, "fedsea1:" + text):
        try:
            joined = JoinString.parse(given)
        except InputError:
            continue
        assert JoinString.parse(joined.encode()) == joined
        assert joined.hub.endpoint(Channel.CTL).startswith("tcp://")


def _join_seeds() -> list[bytes]:
    key = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"
    hubs = [HubAddress(host, 1, 2, 65535, key) for host in ("10.0.0.1", "hub.example.org", "fe80::1%eth0")]
    texts = [JoinString(hub, token).encode() for hub in hubs for token in (b"", bytes(16))]
    return [text.encode() for text in texts] + [text.removeprefix("fedsea1:").encode() for text in texts]


# --- adapters ----------------------------------------------------------------------------------


def fuzz_upload(data: bytes) -> None:
    """An edge's adapter file; what is taken holds our tensors and nothing else."""
    try:
        tensors = parse_upload(data, _ADAPTER)
    except ProtocolError:
        return
    for name, value in tensors.items():
        assert value.shape == _ADAPTER[name].shape
        assert bool(torch.isfinite(value).all())


def _upload_seeds() -> list[bytes]:
    one = dict([next(iter(_ADAPTER.items()))])
    return [save(_ADAPTER), save(one), save({}), save({"x": torch.zeros(0, 4)}), save(one, metadata={"format": "pt"})]


# --- packed weights ------------------------------------------------------------------------------


def fuzz_planes(data: bytes) -> None:
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


def _planes_seeds() -> list[bytes]:
    data = bytes(range(8)) * 64
    packed = [(element, pack(data, element)) for element in (1, 2, 4)]
    return [struct.pack("<HBB", len(data), element - 1, 9) + (code or b"") for element, code in packed]


TARGETS = {
    "decode": Target(fuzz_decode, _decode_seeds),
    "layout": Target(fuzz_layout, _layout_seeds),
    "join_string": Target(fuzz_join_string, _join_seeds),
    "upload": Target(fuzz_upload, _upload_seeds),
    "planes": Target(fuzz_planes, _planes_seeds),
}
