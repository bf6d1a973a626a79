"""How each message's fields cross in the header, worked out once from its type hints and limits.

A field has a reader and a writer. The reader is strict: what comes off the wire has exactly the right
type (a bool is no integer, an integer no float) and keeps its limits. The writer holds our own code to
the same limits, but takes what Python calls an integer or a number.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass

from messaging.errors import ProtocolError
from messaging.messages import AnyMessage, Limit, Tensor

Convert = Callable[[object], object]

#: What a hint without a `Limit` of its own may hold.
INTEGER = Limit((1 << 53) - 1)
CHARACTERS = Limit(128)
ITEMS = Limit(64)


@dataclass(frozen=True, slots=True)
class FieldCodec:
    """One field: its name in errors, and how its value is read from and written to the header."""

    where: str
    name: str
    read: Convert
    write: Convert


@dataclass(frozen=True, slots=True)
class Schema:
    """A dataclass on the wire: its scalar fields in order, then the names of its tensor fields in order.

    `order` gives, for each field of the dataclass, its place among the scalars followed by the tensors.
    """

    cls: type
    scalars: tuple[FieldCodec, ...]
    tensors: tuple[str, ...]
    order: tuple[int, ...] | None

    def read(self, values: Sequence[object]) -> list[object]:
        """The scalars' values from as many items of a header. ProtocolError names the first that is wrong."""
        return [codec.read(value) for codec, value in zip(self.scalars, values, strict=True)]

    def write(self, item: object) -> list[object]:
        """The scalars of `item` as they go into a header."""
        return [codec.write(getattr(item, codec.name)) for codec in self.scalars]


def schema_of(cls: type) -> Schema:
    """Build the schema of a dataclass from its hints; TypeError for a hint that has no form on the wire."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [item.name for item in fields(cls)]
    scalars = [name for name in names if hints[name] is not Tensor]
    tensors = [name for name in names if hints[name] is Tensor]
    codecs = tuple(_field(f"{cls.__name__}.{name}", name, hints[name]) for name in scalars)
    order = tuple((scalars + tensors).index(name) for name in names)
    straight = order == tuple(range(len(names)))
    return Schema(cls, codecs, tuple(tensors), None if straight else order)


def _field(where: str, name: str, hint: object) -> FieldCodec:
    read, write = _converters(where, hint)
    return FieldCodec(where, name, read, write)


def _converters(where: str, hint: object) -> tuple[Convert, Convert]:
    limit: Limit | None = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, limit = typing.get_args(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        return _integer(where, limit or INTEGER)
    if hint is float:
        return _number(where)
    if hint is str or hint is bytes:
        assert isinstance(hint, type)
        return _sized(where, hint, limit or CHARACTERS)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _items(where, args[0], limit or ITEMS)
    if origin is types.UnionType and len(args) == 2 and args[1] is type(None):
        return _optional(*_converters(where, args[0]))
    if isinstance(hint, type) and is_dataclass(hint):
        return _nested(where, schema_of(hint))
    raise TypeError(f"{where}: {hint!r} has no form on the wire")


def _integer(where: str, limit: Limit) -> tuple[Convert, Convert]:
    least, most = limit.least, limit.most

    def read(value: object) -> int:
        if type(value) is not int:
            raise ProtocolError(f"{where}: {type(value).__name__} where an integer belongs")
        if not least <= value <= most:
            raise ProtocolError(f"{where}: {value} is outside {least} to {most}")
        return value

    def write(value: object) -> int:
        if type(value) is int and least <= value <= most:
            return value
        # An IntEnum or a bool of our own code becomes the plain integer that the other side wants.
        return read(int(value) if isinstance(value, int) else value)

    return read, write


def _number(where: str) -> tuple[Convert, Convert]:
    def read(value: object) -> float:
        if type(value) is not float:
            raise ProtocolError(f"{where}: {type(value).__name__} where a number belongs")
        if not math.isfinite(value):
            raise ProtocolError(f"{where}: not a finite number")
        return value

    def write(value: object) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return read(float(typing.cast(float, value)) if is_number else value)

    return read, write


def _sized(where: str, kind: type, limit: Limit) -> tuple[Convert, Convert]:
    most = limit.most

    def read(value: object) -> object:
        if type(value) is not kind:
            raise ProtocolError(f"{where}: {type(value).__name__} where {kind.__name__} belongs")
        if len(typing.cast(str, value)) > most:
            raise ProtocolError(f"{where}: longer than {most}")
        return value

    return read, read


def _items(where: str, hint: object, limit: Limit) -> tuple[Convert, Convert]:
    most = limit.most
    read_item, write_item = _converters(f"{where}[]", hint)

    def read(value: object) -> tuple[object, ...]:
        if type(value) is not tuple:
            raise ProtocolError(f"{where}: {type(value).__name__} where an array belongs")
        if len(value) > most:
            raise ProtocolError(f"{where}: {len(value)} items, at most {most}")
        for item in value:
            read_item(item)
        return value

    def write(value: object) -> tuple[object, ...]:
        return read(tuple(write_item(item) for item in typing.cast("typing.Iterable[object]", value)))

    return read, write


def _optional(read: Convert, write: Convert) -> tuple[Convert, Convert]:
    return (
        lambda value: None if value is None else read(value),
        lambda value: None if value is None else write(value),
    )


def _nested(where: str, schema: Schema) -> tuple[Convert, Convert]:
    if schema.tensors:
        raise TypeError(f"{where}: only a message itself may hold tensors")
    codecs = schema.scalars

    def read(value: object) -> object:
        if type(value) is not tuple or len(value) != len(codecs):
            raise ProtocolError(f"{where}: not an array of {len(codecs)} fields")
        return schema.cls(*schema.read(value))

    def write(value: object) -> object:
        if not isinstance(value, schema.cls):
            raise ProtocolError(f"{where}: {type(value).__name__} where {schema.cls.__name__} belongs")
        return tuple(schema.write(value))

    return read, write


def message_schemas() -> dict[int, Schema]:
    """The schema of every message, by its kind."""
    return {cls.kind: schema_of(cls) for cls in typing.get_args(AnyMessage)}
