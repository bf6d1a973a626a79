"""One valid packet of every message, made from its type hints: what fuzzing and mutations begin with."""

from __future__ import annotations

import random
import typing
from dataclasses import fields, is_dataclass
from typing import Any

import messaging.messages as m
from messaging.framing import encode

#: The longest text and the longest array of a sample, where the limit allows more.
_LONG = 12
KINDS: dict[int, type[m.Message]] = {cls.kind: cls for cls in typing.get_args(m.AnyMessage)}


def packet(cls: type, rng: random.Random, envelope: m.Envelope | None = None) -> m.Packet:
    """A packet whose fields hold values within their limits, chosen by `rng`."""
    return m.Packet(_instance(cls, rng), envelope or m.Envelope(*(_integer(rng, (1 << 53) - 1) for _ in range(6))))


def frames(cls: type, rng: random.Random) -> list[bytes]:
    """The frames of such a packet."""
    return [bytes(frame) for frame in encode(packet(cls, rng))]


def _instance(cls: type, rng: random.Random) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    return cls(**{item.name: _value(hints[item.name], rng) for item in fields(cls)})


def _value(hint: Any, rng: random.Random) -> Any:
    most = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, limit = typing.get_args(hint)
        most = limit.most
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        return tuple(_value(inner, rng) for _ in range(rng.randrange(min(most or _LONG, _LONG))))
    if hint is int:
        return _integer(rng, (1 << 53) - 1 if most is None else most)
    if hint is float:
        return rng.choice([0.0, 1.5, -1e300, 5e-324])
    if hint is str:
        return "".join(chr(rng.choice([rng.randrange(32, 127), 0x1B, 0xE9, 0x1F600])) for _ in range(_count(rng, most)))
    if hint is bytes:
        return rng.randbytes(_count(rng, most))
    if hint is m.Tensor:
        return _tensor(rng)
    if is_dataclass(hint):
        return _instance(typing.cast(type, hint), rng)
    return rng.choice([None, 2.5])


def _integer(rng: random.Random, most: int) -> int:
    return rng.choice([0, most, rng.randrange(most + 1), rng.randrange(min(most, 300) + 1)])


def _count(rng: random.Random, most: int | None) -> int:
    return rng.randrange(min(most or _LONG, _LONG) + 1)


def _tensor(rng: random.Random) -> m.Tensor:
    dtype = rng.choice(sorted(m.DTYPES))
    shape = tuple(rng.randrange(4) for _ in range(rng.randrange(m.MAX_DIMS + 1)))
    data = rng.randbytes(m.Tensor(dtype, shape, ()).nbytes)
    return m.Tensor(dtype, shape, (data,))
