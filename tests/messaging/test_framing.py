"""Every message survives the wire; whatever else comes off it ends in a ProtocolError."""

from __future__ import annotations

import typing
from dataclasses import fields, replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from messaging.errors import ErrorCode, ProtocolError, VersionMismatch
from messaging.framing import SCHEMAS, decode, encode
from messaging.messages import (
    DTYPES,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    PROTOCOL_VERSION,
    TO_EDGE,
    TO_HUB,
    UNORDERED_BASE,
    AnyMessage,
    Describe,
    Enrol,
    Enrolled,
    Envelope,
    Error,
    Infer,
    InferHidden,
    Limit,
    Packet,
    Ping,
    Recipe,
    StepHidden,
    Tensor,
)

EVERYTHING = frozenset(SCHEMAS)
INTEGERS = st.integers(0, (1 << 53) - 1)


# --- strategies ------------------------------------------------------------------------------


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    nbytes = Tensor(dtype, shape, ()).nbytes
    return Tensor(dtype, shape, (draw(st.binary(min_size=nbytes, max_size=nbytes)),))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field with this type hint may hold."""
    limit = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, limit = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        items = min(8, limit.most if limit else 8)
        return st.lists(values(typing.get_args(hint)[0]), max_size=items).map(tuple)
    if hint is int:
        bounds = limit or Limit((1 << 53) - 1)
        return st.integers(bounds.least, bounds.most)
    if hint is float:
        return st.floats(allow_nan=False, allow_infinity=False)
    if hint is str:
        return st.text(st.characters(codec="utf-8"), max_size=limit.most if limit else 128)
    if hint is bytes:
        return st.binary(max_size=limit.most if limit else 64)
    if hint is Tensor:
        return tensors()
    if hint is Recipe:
        return instances(Recipe)
    assert typing.get_args(hint) == (float, type(None))
    return st.none() | values(float)


def instances(cls: type) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{item.name: values(hints[item.name]) for item in fields(cls)})


messages = st.one_of([instances(cls) for cls in typing.get_args(AnyMessage)])
envelopes = st.builds(Envelope, *[INTEGERS] * 6)
packets = st.builds(Packet, messages, envelopes)


def plain(packet: Packet) -> Any:
    """A packet as comparable values: tensors by their bytes."""
    found = {}
    for item in fields(packet.message):
        value = getattr(packet.message, item.name)
        if isinstance(value, Tensor):
            value = (value.dtype, value.shape, b"".join(value.chunks))
        found[item.name] = value
    return type(packet.message), found, packet.envelope


def infer(**changes: Any) -> Infer:
    """One decoded token of a model with hidden size 512."""
    smashed = Tensor("f32", (1, 1, 512), (bytes(range(256)) * 8,))
    return replace(Infer(stream=3, past=40, version=2, layout=(0,), order=(), smashed=smashed), **changes)


def frames_with(place: int, value: object) -> list[Any]:
    """The frames of an `Infer` with one header field replaced."""
    packed, *chunks = encode(Packet(infer(), Envelope(1, 2, UNORDERED_BASE, 4, 5, 6)))
    header = msgpack.unpackb(packed)
    header[place] = value
    return [msgpack.packb(header), *chunks]


# --- there and back --------------------------------------------------------------------------


@given(packets)
@settings(max_examples=300, deadline=None)
def test_round_trip(packet: Packet) -> None:
    frames = encode(packet)
    assert all(len(frame) <= MAX_FRAME_BYTES for frame in frames)
    assert plain(decode(frames, EVERYTHING)) == plain(packet)


@given(packets)
@settings(max_examples=50, deadline=None)
def test_same_packet_same_bytes(packet: Packet) -> None:
    assert encode(packet) == encode(packet)


def test_every_message_has_a_kind_and_a_direction() -> None:
    kinds = [cls.kind for cls in typing.get_args(AnyMessage)]
    assert sorted(kinds) == list(range(1, len(kinds) + 1))
    assert TO_HUB | TO_EDGE | {Enrol.kind, Enrolled.kind} == set(kinds)
    assert not TO_HUB & TO_EDGE


def test_large_tensors_are_cut_without_copying() -> None:
    data = memoryview(bytearray(2 * MAX_FRAME_BYTES + 12))
    tensor = Tensor("u8", (len(data),), (data,))
    frames = encode(Packet(StepHidden(1, tensor)))
    assert [len(frame) for frame in frames[1:]] == [MAX_FRAME_BYTES, MAX_FRAME_BYTES, 12]
    data[-1] = 7
    assert frames[-1][-1] == 7
    message = decode(frames, TO_EDGE).message
    assert isinstance(message, StepHidden)
    assert list(message.hidden.chunks) == frames[1:]
    assert encode(Packet(message)) == frames


def test_chunks_of_any_size_are_sent_as_regular_frames() -> None:
    tensor = Tensor("u8", (MAX_FRAME_BYTES + 3,), (b"abc", bytes(MAX_FRAME_BYTES)))
    assert [len(frame) for frame in encode(Packet(InferHidden(tensor)))[1:]] == [MAX_FRAME_BYTES, 3]


def test_header_of_a_decoded_token_is_small() -> None:
    envelope = Envelope(1 << 20, 70_000, UNORDERED_BASE + 9, 70_000, 1 << 40, 600_000)
    assert len(encode(Packet(infer(past=70_000, version=70_000), envelope))[0]) <= 60
    assert len(encode(Packet(InferHidden(infer().smashed), envelope))[0]) <= 60


def test_own_integers_and_numbers_become_plain_ones() -> None:
    error = decode(encode(Packet(Error(ErrorCode.GAP, 7, "gap"))), TO_EDGE).message
    assert isinstance(error, Error)
    assert type(error.code) is int
    ping = decode(encode(Packet(Ping("training", 1, 2, 3, 0, 1, None))), TO_HUB).message
    assert isinstance(ping, Ping)
    assert ping.tokens_per_s == 2.0


# --- what is refused -------------------------------------------------------------------------

#: (header field to replace, value, words in the error)
LIMITS = [
    (1, 99, "kind"),
    (1, True, "kind"),
    (1, Error.kind, "kind"),
    (2, True, "Envelope.session"),
    (2, -1, "Envelope.session"),
    (3, "1", "Envelope.epoch"),
    (4, 1 << 53, "Envelope.request"),
    (5, None, "Envelope.ack"),
    (6, 1.0, "Envelope.credits"),
    (7, [1], "Envelope.deadline_ms"),
    (8, [], "tensors"),
    (8, [[1, 1, 1, 512]] * 2, "tensors"),
    (8, [[]], "smashed"),
    (8, [[1, 1, 1, 1, 1, 512]], "smashed"),
    (8, [[9, 1, 1, 512]], "dtype"),
    (8, [[True, 1, 1, 512]], "dtype"),
    (8, [[1, 1, 1, True]], "size"),
    (8, [[1, 1, 1, -512]], "size"),
    (8, [[1, 1 << 40, 1, 1]], "size"),
    (8, [[1, 1 << 15, 1 << 15, 1]], "at most"),
    (8, [[1, 1, 1, 513]], "bytes"),
    (8, [[1, 1, 1, 511]], "bytes"),
    (8, [[2, 1, 1, 512]], "bytes"),
    (9, -1, "Infer.stream"),
    (9, 1.5, "Infer.stream"),
    (12, 3, "Infer.layout"),
    (12, [True], "Infer.layout[]"),
    (12, [0] * 4097, "header"),
    (13, [0] * 1025, "Infer.order"),
    (13, ["0"], "Infer.order[]"),
    (13, {"a": 1}, "header"),
    (13, msgpack.ExtType(5, b"x"), "header"),
    (13, msgpack.Timestamp(1), "header"),
    (13, b"x" * 65, "header"),
]


@pytest.mark.parametrize(("place", "value", "words"), LIMITS)
def test_a_field_beyond_its_limits_is_named(place: int, value: object, words: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(frames_with(place, value), TO_HUB)
    assert words in str(caught.value)
    assert not isinstance(caught.value, VersionMismatch)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3, True, None, "1"])
def test_a_scalar_that_is_no_finite_number(number: object) -> None:
    frames = encode(Packet(Ping("training", 1, 2.0, 3.0, 0.0, 0.0, 1.0)))
    header = msgpack.unpackb(frames[0])
    header[11] = number
    with pytest.raises(ProtocolError, match=r"Ping\.tokens_per_s"):
        decode([msgpack.packb(header)], TO_HUB)


def test_text_and_name_limits() -> None:
    with pytest.raises(ProtocolError, match=r"Error\.text"):
        encode(Packet(Error(1, 0, "x" * 2049)))
    header = msgpack.unpackb(encode(Packet(Error(1, 0, "")))[0])
    header[11] = "x" * 2049
    with pytest.raises(ProtocolError, match=r"Error\.text"):
        decode([msgpack.packb(header)], TO_EDGE)
    header[11] = b"no text"
    with pytest.raises(ProtocolError, match=r"Error\.text"):
        decode([msgpack.packb(header)], TO_EDGE)


def test_frames_that_do_not_fit_the_header() -> None:
    header, data = encode(Packet(infer()))
    for frames in ([], [header], [header, data, b""], [header, data, data], [header, data[:-1]], [header, b"", data]):
        with pytest.raises(ProtocolError):
            decode(frames, TO_HUB)
    split = [header, data[:1024], data[1024:]]
    with pytest.raises(ProtocolError, match="smashed"):
        decode(split, TO_HUB)


def test_headers_that_are_none() -> None:
    deep = b"\xdc\x10\x00" * 5000
    for header in (b"", b"\xc1", b"\x93\x01", msgpack.packb({"v": 1}), msgpack.packb(7), msgpack.packb([]), deep):
        with pytest.raises(ProtocolError):
            decode([header], TO_HUB)
    with pytest.raises(ProtocolError, match="at most"):
        decode([bytes(MAX_HEADER_BYTES + 1)], TO_HUB)


def test_too_few_and_too_many_fields() -> None:
    header, data = encode(Packet(infer()))
    full = msgpack.unpackb(header)
    for wrong in (full[:-1], [*full, 0], full[:8], full[:1]):
        with pytest.raises(ProtocolError, match="fields"):
            decode([msgpack.packb(wrong), data], TO_HUB)


@pytest.mark.parametrize("rest", [[], [1], ["other", {"shape": 1}], [msgpack.ExtType(9, b"x")], [b"x" * 5000]])
def test_another_version_is_told_whatever_the_rest(rest: list[object]) -> None:
    other = PROTOCOL_VERSION + 1
    with pytest.raises(VersionMismatch, match=f"version {other}") as caught:
        decode([msgpack.packb([other, *rest])], TO_HUB)
    assert (caught.value.theirs, caught.value.ours) == (other, PROTOCOL_VERSION)


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_no_version_at_all(version: object) -> None:
    with pytest.raises(ProtocolError, match="version") as caught:
        decode([msgpack.packb([version, 3])], TO_HUB)
    assert not isinstance(caught.value, VersionMismatch)


def test_encode_holds_our_own_code_to_the_limits() -> None:
    data = infer().smashed.chunks
    for message in (
        infer(past=-1),
        infer(layout=("x",)),
        infer(layout=tuple([1 << 40] * 4096)),
        infer(smashed=Tensor("f64", (1, 1, 512), data)),
        infer(smashed=Tensor("f32", (1, 1, 511), data)),
        infer(smashed=Tensor("q8", (1, 1, 512), (bytes(512),))),
        infer(smashed=Tensor("f32", (1, 1, 1, 1, 512), data)),
        infer(smashed=Tensor("u8", (MAX_TENSOR_BYTES + 1,), ())),
        Enrol("text", "name"),  # type: ignore[arg-type]
        Describe(1, 1, 5),  # type: ignore[arg-type]
    ):
        with pytest.raises(ProtocolError):
            encode(Packet(message))


# --- noise -----------------------------------------------------------------------------------


def decodes_or_refuses(frames: list[Any]) -> None:
    try:
        packet = decode(frames, EVERYTHING)
    except ProtocolError:
        return
    encode(packet)  # what was accepted keeps our own limits


@given(st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=300, deadline=None)
def test_random_frames(frames: list[bytes]) -> None:
    decodes_or_refuses(list(frames))


@given(packets, st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4), st.sampled_from(["set", "insert", "cut"]))
@settings(max_examples=500, deadline=None)
def test_mutated_headers(packet: Packet, place: int, noise: bytes, how: str) -> None:
    frames = encode(packet)
    header = bytes(frames[0])
    at = place % len(header)
    rest = {"set": header[at + len(noise) :], "insert": header[at:], "cut": b""}[how]
    decodes_or_refuses([header[:at] + (b"" if how == "cut" else noise) + rest, *frames[1:]])


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@given(packets, st.integers(0, 40), ANYTHING)
@settings(max_examples=500, deadline=None)
def test_header_fields_replaced_by_anything(packet: Packet, place: int, value: object) -> None:
    frames = encode(packet)
    header = msgpack.unpackb(frames[0])
    header[place % len(header)] = value
    decodes_or_refuses([msgpack.packb(header), *frames[1:]])


@given(packets, st.integers(0, 3), st.binary(max_size=9))
@settings(max_examples=200, deadline=None)
def test_frames_dropped_doubled_or_strange(packet: Packet, place: int, strange: bytes) -> None:
    frames = encode(packet)
    at = place % len(frames)
    decodes_or_refuses(frames[:at] + frames[at + 1 :])
    decodes_or_refuses([*frames[:at], strange, *frames[at:]])
    decodes_or_refuses([*frames[: at + 1], *frames[at:]])
