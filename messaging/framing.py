"""Messages to frames and back.

    [header][tensor bytes]...

The header is one positional msgpack array: protocol version, kind, the envelope's six integers, the
tensors' descriptions, then the message's scalar fields in the order of `messages.py`. A tensor is
described as [dtype code, size, ...] and follows as raw frames of exactly MAX_FRAME_BYTES, the last one
shorter; so the number of frames follows from the shape. Nothing is allocated on the word of the other
side, and tensor data is not copied.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import cast

import msgpack  # type: ignore[import-untyped]

from messaging.errors import ProtocolError, VersionMismatch
from messaging.messages import (
    DTYPES,
    MAX_DIMS,
    MAX_FRAME_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSOR_BYTES,
    MAX_TENSORS,
    PROTOCOL_VERSION,
    AnyMessage,
    Envelope,
    Packet,
    Tensor,
    nbytes_of,
)
from messaging.schema import message_schemas, schema_of
from messaging.transport import Buffer

SCHEMAS = message_schemas()
ENVELOPE = schema_of(Envelope)
#: Places in the header: version, kind, envelope, tensors; the message's scalars come after them.
_ENVELOPE_AT = 2
_TENSORS_AT = _ENVELOPE_AT + len(ENVELOPE.scalars)
_SCALARS_AT = _TENSORS_AT + 1
#: What msgpack may find in a header; the longest text is 2048 characters of 4 bytes.
_LIMITS = {
    "raw": False, "use_list": False, "strict_map_key": True, "max_str_len": 8192, "max_bin_len": 64, "max_map_len": 0,
    "max_ext_len": 0,
}  # fmt: skip
_MOST_ITEMS = 4096
#: The header's own array, its tensors or a recipe, and what those hold.
_DEPTH = 3
_ARRAY_HEADS = frozenset(bytes([code]) for code in (*range(0x90, 0xA0), 0xDC, 0xDD))
#: A header with more bytes of these values than this may be made of arrays of arrays.
_MANY_ARRAYS = 8
_DTYPE_OF_CODE = {code: name for name, (code, _) in DTYPES.items()}


# --- packet to frames ------------------------------------------------------------------------


def encode(packet: Packet) -> list[Buffer]:
    """The frames of a packet. Their tensor data is the packet's own memory.

    ProtocolError when the packet breaks the limits that the other side will hold it to.
    """
    message, envelope = packet.message, packet.envelope
    schema = SCHEMAS[message.kind]
    header: list[object] = [PROTOCOL_VERSION, message.kind]
    header += ENVELOPE.write(envelope)
    chunks: list[Buffer] = []
    described: list[list[int]] = []
    for name in schema.tensors:
        tensor = getattr(message, name)
        described.append(_describe(tensor, name))
        chunks += _frames_of(tensor)
    header.append(described)
    header += schema.write(message)
    try:
        packed = msgpack.packb(header)
    except UnicodeEncodeError:
        raise ProtocolError(f"{type(message).__name__}: holds text that is no Unicode") from None
    if len(packed) > MAX_HEADER_BYTES:
        name = type(message).__name__
        raise ProtocolError(f"the header of {name} has {len(packed)} bytes, at most {MAX_HEADER_BYTES}")
    return [packed, *chunks]


def _describe(tensor: Tensor, where: str) -> list[int]:
    if tensor.dtype not in DTYPES:
        raise ProtocolError(f"{where}: dtype {tensor.dtype} does not cross the wire")
    if len(tensor.shape) > MAX_DIMS or tensor.nbytes > MAX_TENSOR_BYTES:
        raise ProtocolError(f"{where}: a tensor of {tuple(tensor.shape)} is too large for the wire")
    if sum(len(chunk) for chunk in tensor.chunks) != tensor.nbytes:
        raise ProtocolError(f"{where}: the data is not the {tensor.nbytes} bytes of its shape")
    return [DTYPES[tensor.dtype][0], *tensor.shape]


def _frames_of(tensor: Tensor) -> Sequence[Buffer]:
    """The data cut into frames of MAX_FRAME_BYTES; chunks that are cut so already pass as they are."""
    chunks = tensor.chunks
    if len(chunks) > 1 and any(len(chunk) != MAX_FRAME_BYTES for chunk in chunks[:-1]):
        chunks = (b"".join(chunks),)
    frames: list[Buffer] = []
    for chunk in chunks:
        size = len(chunk)
        if 0 < size <= MAX_FRAME_BYTES:
            frames.append(chunk)
        else:
            view = memoryview(chunk)
            frames += [view[at : at + MAX_FRAME_BYTES] for at in range(0, size, MAX_FRAME_BYTES)]
    return frames


# --- frames to packet ------------------------------------------------------------------------


def decode(frames: Sequence[Buffer], expect: Set[int]) -> Packet:
    """The packet in `frames`, whose kind must be one of `expect` (see TO_HUB, TO_EDGE in messages.py).

    ProtocolError names what is wrong; VersionMismatch, one of those, is told by the first header field
    whatever the rest looks like. Whether the numbers of a tensor are finite is not checked here.
    """
    if not frames:
        raise ProtocolError("a message without frames")
    header = _unpack(frames[0])
    if type(header[1]) is not int or header[1] not in expect or header[1] not in SCHEMAS:
        raise ProtocolError("header: a kind of message that does not belong here")
    schema = SCHEMAS[header[1]]
    count = _SCALARS_AT + len(schema.scalars)
    if len(header) != count:
        raise ProtocolError(f"{schema.cls.__name__}: {len(header)} header fields, not {count}")
    envelope = Envelope(*ENVELOPE.read(header[_ENVELOPE_AT:_TENSORS_AT]))  # type: ignore[arg-type]
    values = schema.read(header[_SCALARS_AT:])
    values += _tensors(header[_TENSORS_AT], schema.tensors, frames)
    if schema.order is not None:
        values = [values[at] for at in schema.order]
    return Packet(cast(AnyMessage, schema.cls(*values)), envelope)


def _unpack(frame: Buffer) -> tuple[object, ...]:
    """The header's fields, at least `_SCALARS_AT` of them, of our own protocol version."""
    if len(frame) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header: {len(frame)} bytes, at most {MAX_HEADER_BYTES}")
    header = bytes(frame)
    try:
        if header.count(b"\xdc") + header.count(b"\xdd") > _MANY_ARRAYS:
            fields = _read_carefully(header)
        else:
            fields = msgpack.unpackb(header, **_LIMITS, max_array_len=_MOST_ITEMS)
    except (ValueError, msgpack.UnpackException) as error:
        _check_version(_first_field(header))
        raise ProtocolError(f"header: not readable as msgpack within its limits ({type(error).__name__})") from None
    if type(fields) is not tuple or not fields:
        raise ProtocolError("header: not an array")
    _check_version(fields[0])
    if len(fields) < _SCALARS_AT:
        raise ProtocolError(f"header: {len(fields)} fields, at least {_SCALARS_AT}")
    return fields


def _read_carefully(header: bytes) -> object:
    """As unpackb, but arrays inside of arrays are followed to the depth of our messages only.

    unpackb makes room for every array as soon as it is announced: 3 KB of array heads in one another, 33 MB.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_HEADER_BYTES, **_LIMITS, max_array_len=0)
    unpacker.feed(header)

    def value(depth: int) -> object:
        at = unpacker.tell()
        if header[at : at + 1] not in _ARRAY_HEADS:
            return unpacker.unpack()
        count = unpacker.read_array_header()
        if depth == 0 or count > min(_MOST_ITEMS, len(header) - at):
            raise ValueError("an array too deep or too long")
        return tuple([value(depth - 1) for _ in range(count)])

    fields = value(_DEPTH)
    if unpacker.tell() != len(header):
        raise ValueError("more than one value")
    return fields


def _first_field(header: bytes) -> object:
    """The first element of an array whose other elements cannot be read; None if that cannot be either."""
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_HEADER_BYTES, max_str_len=64, max_map_len=0, max_array_len=0)
    try:
        unpacker.feed(header)
        return unpacker.unpack() if unpacker.read_array_header() else None
    except (ValueError, msgpack.UnpackException):
        return None


def _check_version(version: object) -> None:
    if version == PROTOCOL_VERSION and type(version) is int:
        return
    if type(version) is int and version > 0:
        raise VersionMismatch(version, PROTOCOL_VERSION)
    raise ProtocolError("header: does not begin with a protocol version")


def _tensors(described: object, names: tuple[str, ...], frames: Sequence[Buffer]) -> list[Tensor]:
    """The tensors that the header describes, on the frames behind it; every frame must be used."""
    if type(described) is not tuple or len(described) > MAX_TENSORS or len(described) != len(names):
        raise ProtocolError(f"header: not an array of {len(names)} tensors")
    tensors = []
    at = 1
    for name, description in zip(names, described, strict=True):
        dtype, shape, nbytes = _description(description, name)
        count = -(-nbytes // MAX_FRAME_BYTES)
        chunks = tuple(frames[at : at + count])
        if len(chunks) != count or not _full(chunks, nbytes):
            raise ProtocolError(f"{name}: its frames are not the {nbytes} bytes of {dtype} {list(shape)}")
        tensors.append(Tensor(dtype, shape, chunks))
        at += count
    if at != len(frames):
        raise ProtocolError(f"{len(frames) - at} frames more than the header describes")
    return tensors


def _description(description: object, where: str) -> tuple[str, tuple[int, ...], int]:
    """dtype, shape and bytes of one tensor."""
    if type(description) is not tuple or not 1 <= len(description) <= MAX_DIMS + 1:
        raise ProtocolError(f"{where}: not described by a dtype and at most {MAX_DIMS} sizes")
    code, *shape = description
    if type(code) is not int or code not in _DTYPE_OF_CODE:
        raise ProtocolError(f"{where}: no such dtype")
    dtype = _DTYPE_OF_CODE[code]
    for size in shape:
        if type(size) is not int or not 0 <= size <= MAX_TENSOR_BYTES:
            raise ProtocolError(f"{where}: a size that is no size")
    nbytes = nbytes_of(dtype, tuple(shape))
    if nbytes > MAX_TENSOR_BYTES:
        raise ProtocolError(f"{where}: {nbytes} bytes, at most {MAX_TENSOR_BYTES}")
    return dtype, tuple(shape), nbytes


def _full(chunks: tuple[Buffer, ...], nbytes: int) -> bool:
    """Whether the chunks are whole frames, but for the last, and `nbytes` together."""
    for chunk in chunks:
        if len(chunk) != min(nbytes, MAX_FRAME_BYTES):
            return False
        nbytes -= MAX_FRAME_BYTES
    return True
