"""A hub's files in this process: what edges fetch from without a network."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from blocks.planes import pack
from messaging.errors import FedseaError, HubUnreachable
from messaging.framing import decode, encode
from messaging.messages import TO_EDGE, AnyMessage, Chunk, Fetch, Packet, Tensor

Mangle = Callable[[Fetch, Chunk], AnyMessage]


class HubHere:
    """Asks a library in this process, through the wire's own encoding."""

    def __init__(self, find: Callable[[str], Any]) -> None:
        self._find = find
        self.asked: list[Fetch] = []
        self.mangle: Mangle = lambda _, chunk: chunk
        self.dies_after = 10**9

    def submit(self, message: AnyMessage) -> Future[Any]:
        assert isinstance(message, Fetch)
        self.asked.append(message)
        answer: Future[Any] = Future()
        try:
            answer.set_result(self._answer(message))
        except FedseaError as error:
            answer.set_exception(error)
        return answer

    def _answer(self, asked: Fetch) -> AnyMessage:
        if len(self.asked) > self.dies_after:
            raise HubUnreachable("the hub was switched off")
        resource = self._find(asked.resource)
        data = resource.read(asked.offset, asked.length)
        packed = pack(data, asked.element) if asked.element else None
        element, data = (0, data) if packed is None else (asked.element, packed)
        chunk = Chunk(asked.offset, resource.total, resource.sha256, element, Tensor("u8", (len(data),), (data,)))
        answer = self.mangle(asked, chunk)
        return decode([bytes(frame) for frame in encode(Packet(answer))], TO_EDGE).message

    @property
    def names(self) -> list[str]:
        return [message.resource for message in self.asked]


class Blob:
    def __init__(self, data: bytes) -> None:
        self.data, self.total, self.sha256 = data, len(data), hashlib.sha256(data).hexdigest()

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]
