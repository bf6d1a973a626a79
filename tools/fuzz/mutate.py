"""Breaks valid messages: bits, lengths, fields, frames. For a decoder, and for a hub that has to go on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]

from messaging.messages import MAX_HEADER_BYTES

#: Values that no field takes, or that only just fit.
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 31, (1 << 53) - 1, 1 << 53, (1 << 64) - 1, -(1 << 63)),
    *(float("nan"), float("inf"), -float("inf"), -0.0, 1e308),
    *("", "x" * 2049, "\x1b]0;title\x07", "\u202e", b"", b"x" * 65, [], [[]], {}, {"a": 1}),
    *([[[[[[]]]]]], [0] * 4097, [-1], [float("nan")], msgpack.ExtType(5, b"x"), msgpack.Timestamp(0, 1)),
)
#: Beginnings that announce more than comes: strings, bytes, arrays, maps and extensions of up to 4 GB.
ANNOUNCED = (
    *(bytes([code]) + b"\xff\xff\xff\xff" for code in (0xC6, 0xC9, 0xDB, 0xDD, 0xDF)),
    *(b"\xdc\x10\x00", b"\xdc\xff\xff"),
)


def mutated(frames: Sequence[bytes], rng: random.Random) -> list[bytes]:
    """The frames with one to three things wrong with them."""
    broken = [bytes(frame) for frame in frames]
    for _ in range(rng.randrange(1, 4)):
        broken = rng.choice(_WAYS)(broken, rng)
    return broken


def _bits(frames: list[bytes], rng: random.Random) -> list[bytes]:
    header = bytearray(frames[0] if frames else b"")
    for _ in range(rng.randrange(1, 5)):
        if header:
            header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
    return [bytes(header), *frames[1:]]


def _cut(frames: list[bytes], rng: random.Random) -> list[bytes]:
    at = rng.randrange(len(frames) or 1)
    return [frame[: rng.randrange(len(frame) + 1)] if i == at else frame for i, frame in enumerate(frames)]


def _announced(frames: list[bytes], rng: random.Random) -> list[bytes]:
    header = frames[0] if frames else b""
    at = rng.randrange(len(header) + 1)
    return [(header[:at] + rng.choice(ANNOUNCED) + header[at:])[:MAX_HEADER_BYTES], *frames[1:]]


def _deep(frames: list[bytes], rng: random.Random) -> list[bytes]:
    header = frames[0] if frames else b""
    at = rng.randrange(len(header) + 1)
    nested = rng.choice([b"\x91", b"\x9f", b"\xdc\x10\x00", b"\x81"]) * rng.randrange(1, 5000)
    return [(header[:at] + nested)[:MAX_HEADER_BYTES], *frames[1:]]


def _field(frames: list[bytes], rng: random.Random) -> list[bytes]:
    fields = _fields(frames)
    if not fields:
        return frames
    fields[rng.randrange(len(fields))] = rng.choice(ODD)
    return [_packed(fields), *frames[1:]]


def _inner(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """A value inside of an array field: a tensor's size, a layout's run."""
    fields = _fields(frames)
    arrays = [field for field in fields if isinstance(field, list) and field]
    if arrays:
        array = rng.choice(arrays)
        inner = array[0] if isinstance(array[0], list) and array[0] else array
        inner[rng.randrange(len(inner))] = rng.choice(ODD)
    return [_packed(fields), *frames[1:]] if fields else frames


def _count(frames: list[bytes], rng: random.Random) -> list[bytes]:
    fields = _fields(frames)
    return [_packed(fields[:-1] if rng.random() < 0.5 else [*fields, 0]), *frames[1:]]


def _frames(frames: list[bytes], rng: random.Random) -> list[bytes]:
    """Frames doubled, dropped, turned round, added."""
    at = rng.randrange(len(frames) or 1)
    ways: list[Callable[[], list[bytes]]] = [
        lambda: frames[: at + 1] + frames[at:],
        lambda: frames[:at] + frames[at + 1 :],
        lambda: frames[::-1],
        lambda: [*frames, rng.randbytes(rng.randrange(64))],
        lambda: frames + [b""] * rng.randrange(1, 30),
    ]
    return rng.choice(ways)()


_WAYS = (_bits, _cut, _announced, _deep, _field, _field, _inner, _inner, _count, _frames)


def _fields(frames: list[bytes]) -> list[Any]:
    try:
        fields = msgpack.unpackb(frames[0], strict_map_key=False)
    except (ValueError, IndexError, TypeError, msgpack.UnpackException):
        return []
    return fields if isinstance(fields, list) else []


def _packed(fields: list[Any]) -> bytes:
    try:
        return bytes(msgpack.packb(fields))
    except (ValueError, OverflowError):
        return b""
