"""The decoder against mutations, against fields at and beyond their limits, and against headers that swell."""

from __future__ import annotations

import random
import sys
import typing
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import messaging.messages as m
from messaging.errors import ProtocolError
from messaging.framing import SCHEMAS, decode, encode
from messaging.schema import CHARACTERS, INTEGER, ITEMS
from tools.fuzz import samples
from tools.fuzz.meter import Meter
from tools.fuzz.mutate import ANNOUNCED, mutated

EVERYTHING = frozenset(SCHEMAS)
KINDS = sorted(samples.KINDS)
_FIRST_SCALAR = 9
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory and time are read from /proc")


def decodes_or_refuses(frames: list[Any]) -> None:
    try:
        packet = decode(frames, EVERYTHING)
    except ProtocolError:
        return
    assert encode(decode(encode(packet), EVERYTHING)) == encode(packet)


@given(st.sampled_from(KINDS), st.integers(0, 1 << 32))
@settings(max_examples=600, deadline=None)
def test_mutations_end_in_the_named_error(kind: int, seed: int) -> None:
    rng = random.Random(seed)
    decodes_or_refuses(mutated(samples.frames(samples.KINDS[kind], rng), rng))


@given(st.sampled_from(KINDS), st.sampled_from(KINDS), st.integers(0, 1 << 32), st.data())
@settings(max_examples=300, deadline=None)
def test_two_messages_mixed_up(one: int, other: int, seed: int, data: st.DataObject) -> None:
    rng = random.Random(seed)
    first, second = (samples.frames(samples.KINDS[kind], rng) for kind in (one, other))
    at = data.draw(st.integers(0, len(first[0])))
    decodes_or_refuses([first[0][:at] + second[0][at:], *first[1:]])
    decodes_or_refuses([first[0], *second[1:]])
    decodes_or_refuses([*first, *second])


# --- limits ----------------------------------------------------------------------------------


def limited() -> Iterator[tuple[type, int, Any, Any]]:
    """Message, place in the header, a value at the limit, and one beyond it, for every limited field."""
    for cls in samples.KINDS.values():
        hints = typing.get_type_hints(cls, include_extras=True)
        scalars = [item.name for item in fields(cls) if hints[item.name] is not m.Tensor]
        for place, name in enumerate(scalars, _FIRST_SCALAR):
            for at, beyond in edges_of(hints[name]):
                yield cls, place, at, beyond


def edges_of(hint: Any) -> list[tuple[Any, Any]]:
    limit = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, limit = typing.get_args(hint)
    if hint is int:
        limit = limit or INTEGER
        return [(limit.most, limit.most + 1), (limit.least, limit.least - 1)]
    if hint is str:
        most = (limit or CHARACTERS).most
        return [("\U0001f600" * most, "x" * (most + 1))]
    if hint is bytes:
        assert limit is not None
        return [(b"x" * limit.most, b"x" * (limit.most + 1))]
    if typing.get_origin(hint) is tuple:
        most = (limit or ITEMS).most
        item = 7 if typing.get_args(hint)[0] is int else "x"
        return [((item,) * most, (item,) * (most + 1))]
    return []


CASES = list(limited())


@pytest.mark.parametrize(
    ("cls", "place", "at", "beyond"),
    CASES,
    ids=[f"{cls.__name__}-{place}-{i}" for i, (cls, place, *_) in enumerate(CASES)],
)
def test_every_field_at_its_limit_and_beyond(cls: type, place: int, at: Any, beyond: Any) -> None:
    header, *chunks = samples.frames(cls, random.Random(3))
    plain = msgpack.unpackb(header)
    plain[place] = at
    packet = decode([msgpack.packb(plain), *chunks], EVERYTHING)
    assert msgpack.unpackb(bytes(encode(packet)[0])) == msgpack.unpackb(msgpack.packb(plain))
    plain[place] = beyond
    with pytest.raises(ProtocolError):
        decode([msgpack.packb(plain), *chunks], EVERYTHING)


def test_text_that_is_no_unicode_is_refused_before_it_leaves() -> None:
    with pytest.raises(ProtocolError, match="Unicode"):
        encode(m.Packet(m.Error(1, 0, "file \udcff")))


# --- headers that swell ------------------------------------------------------------------------


def swelling() -> Iterator[bytes]:
    """Small headers that announce much."""
    version = msgpack.packb(m.PROTOCOL_VERSION)
    for head in (b"\xdc\x10\x00", b"\xdd\x00\x00\x10\x00", b"\x9f", b"\x91", b"\xde\x10\x00", b"\x81"):
        for depth in (3, 300, 1000, 3000):
            yield head * depth
            yield b"\xdc\x00\x20" + version + head * depth
            yield b"\xdc\x00\x20" + version + b"\x01" * 7 + head * depth + b"\xc1"
    for head in ANNOUNCED:
        yield head
        yield b"\x9f" + version + head
        yield b"\x9f" + head * 2000


@linux
def test_a_small_header_takes_little_memory_and_time() -> None:
    worst = Meter()
    for header in swelling():
        for _ in range(3):
            with pytest.raises(ProtocolError):
                worst.measure(lambda header=header: decode([header[: m.MAX_HEADER_BYTES]], EVERYTHING))
    assert worst.worst_mb < 12, (
        "unpackb alone takes 33 MB for 3 KB of arrays in one another; huge pages come in pieces of 2 MB"
    )
    assert worst.worst_ms < 50


@given(st.integers(9, 4096), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_numbers_that_look_like_array_heads_are_numbers(count: int, more: int) -> None:
    layout = (0xDC,) * count + (0xDDDC,) * more
    tensor = m.Tensor("u8", (1,), (b"x",))
    message = m.StepForward(1, 1, layout[:4096], tensor)
    decoded = decode(encode(m.Packet(message)), EVERYTHING).message
    assert isinstance(decoded, m.StepForward)
    assert decoded.layout == layout[:4096]
